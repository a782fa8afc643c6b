"""`GET /openapi.json`: valid OpenAPI 3.1, and at one with the parser and with the table of wire cases."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import numpy as np
import pytest
from starlette.testclient import TestClient

from in_process import InProcess
from remote_vae.errors import SENT, RemoteVAEError
from remote_vae.protocol.parameters import Parameter
from remote_vae.protocol.request import read_request
from remote_vae.protocol.result import Provenance, Result
from remote_vae_serve.http.app import create_app
from wire_answers import Decodes, Encodes, Refused
from wire_case import WireCase
from wire_cases import CASES

# What of OpenAPI 3.1 a document like ours may hold: the objects of its specification, no key beside theirs.
OPENAPI: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$ref": "#/$defs/document",
    "$defs": {
        "document": {
            "type": "object",
            "required": ["openapi", "info", "paths"],
            "properties": {
                "openapi": {"type": "string", "pattern": r"^3\.1\.\d+$"},
                "info": {
                    "type": "object",
                    "required": ["title", "version"],
                    "properties": {name: {"type": "string"} for name in ("title", "version", "summary", "description")},
                    "additionalProperties": False,
                },
                "servers": {"type": "array"},
                "tags": {"type": "array"},
                "security": {"type": "array"},
                "paths": {
                    "type": "object",
                    "patternProperties": {"^/": {"$ref": "#/$defs/path"}},
                    "additionalProperties": False,
                },
                "components": {
                    "type": "object",
                    "properties": {
                        "schemas": {"type": "object", "additionalProperties": {"$ref": "#/$defs/schema"}},
                        "securitySchemes": {"type": "object", "additionalProperties": {"type": "object"}},
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "path": {
            "type": "object",
            "patternProperties": {"^(get|put|post|delete|options|head|patch|trace)$": {"$ref": "#/$defs/operation"}},
            "additionalProperties": False,
        },
        "operation": {
            "type": "object",
            "required": ["responses"],
            "properties": {
                "summary": {"type": "string"},
                "description": {"type": "string"},
                "operationId": {"type": "string"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "security": {"type": "array"},
                "parameters": {"type": "array", "items": {"$ref": "#/$defs/parameter"}},
                "requestBody": {
                    "type": "object",
                    "required": ["content"],
                    "properties": {
                        "description": {"type": "string"},
                        "required": {"type": "boolean"},
                        "content": {"$ref": "#/$defs/content"},
                    },
                    "additionalProperties": False,
                },
                "responses": {
                    "type": "object",
                    "minProperties": 1,
                    "patternProperties": {"^[1-5][0-9X]{2}$": {"$ref": "#/$defs/response"}},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "parameter": {
            "type": "object",
            "required": ["name", "in", "schema"],
            "properties": {
                "name": {"type": "string"},
                "in": {"enum": ["query", "header", "path", "cookie"]},
                "description": {"type": "string"},
                "required": {"type": "boolean"},
                "deprecated": {"type": "boolean"},
                "schema": {"$ref": "#/$defs/schema"},
                "example": True,
            },
            "if": {"properties": {"in": {"const": "path"}}},
            "then": {"required": ["required"], "properties": {"required": {"const": True}}},
            "additionalProperties": False,
        },
        "response": {
            "type": "object",
            "required": ["description"],
            "properties": {
                "description": {"type": "string"},
                "headers": {
                    "type": "object",
                    "additionalProperties": {
                        "type": "object",
                        "required": ["schema"],
                        "properties": {"description": {"type": "string"}, "schema": {"$ref": "#/$defs/schema"}},
                        "additionalProperties": False,
                    },
                },
                "content": {"$ref": "#/$defs/content"},
            },
            "additionalProperties": False,
        },
        "content": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]+/[a-z0-9.+*-]+$"},
            "additionalProperties": {
                "type": "object",
                "properties": {"schema": {"$ref": "#/$defs/schema"}},
                "additionalProperties": False,
            },
        },
        "schema": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
    },
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """As it is served."""
    answer = TestClient(create_app(InProcess(), 1, 1)).get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def template_of(case: WireCase) -> str:
    """The path of the document that a case's path is one of."""
    path = "/" + case.path.strip("/")
    if path in ("/", "/models", "/health", "/openapi.json"):
        return path
    return re.sub("^/[^/]+", "/{model}", path)


def documented(document: Mapping[str, Any], case: WireCase) -> dict[str, Any] | None:
    operation: dict[str, Any] | None = document["paths"].get(template_of(case), {}).get(case.method.lower())
    return operation


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(OPENAPI).validate(document)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                yield from references(one)

    found = set(references(document))
    assert found
    for reference in found:
        here: Any = document
        for step in reference.removeprefix("#/").split("/"):
            here = here[step]
        jsonschema.Draft202012Validator.check_schema(here)


def test_a_parameter_is_said_once_and_every_part_of_a_path_is_one(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        said = [(one["in"], one["name"]) for one in operation.get("parameters", [])]
        assert len(said) == len(set(said)), (path, method)
        assert {name for place, name in said if place == "path"} == set(re.findall(r"\{(\w+)\}", path))


def test_every_route_of_the_app_is_described_and_no_other(document: dict[str, Any]) -> None:
    app = create_app(InProcess(), 1, 1)
    described = {(path, method.upper()) for path, method, _ in operations(document)}
    wrong_method = {"PUT", "PATCH", "DELETE", "OPTIONS"}
    served = {
        (route.path.rstrip("/") or "/", method)  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
        if not wrong_method & route.methods or route.path == "/"  # type: ignore[attr-defined]
    }
    served = {(path, method) for path, method in served if path != "/" or method == "POST"}
    assert described == served


class Reading:
    """Which parameters were sent and read."""

    def __init__(self) -> None:
        self.names: set[str] = set()


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    notes = Reading()
    of = Parameter.of

    def noting(self: Parameter[Any], values: Mapping[str, Any]) -> Any:
        notes.names |= {name for name in self.names if name in values}
        return of(self, values)

    monkeypatch.setattr(Parameter, "of", noting)
    return notes


def query_parameters(operation: Mapping[str, Any]) -> set[str]:
    return {one["name"] for one in operation["parameters"] if one["in"] == "query"}


def test_every_parameter_that_the_parser_reads_is_described_where_it_is_read(
    document: dict[str, Any], reading: Reading
) -> None:
    for case in CASES.values():
        operation = documented(document, case)
        if case.method != "POST" or operation is None or "requestBody" not in operation:
            continue
        reading.names.clear()
        with contextlib.suppress(RemoteVAEError):
            read_request(case.verb, case.sent.query, case.sent.headers, bytearray(case.sent.body))
        assert reading.names <= query_parameters(operation), case.name


def test_every_parameter_that_is_described_is_sent_by_a_client(document: dict[str, Any], reading: Reading) -> None:
    """And accepted: a case that is refused is no proof that it works. A hint that means nothing to the models here is read all
    the same; tests/families sends it to a model that it means something to."""
    read: dict[str, set[str]] = {"decode": set(), "encode": set()}
    headers: set[str] = set()
    for case in CASES.values():
        hint = isinstance(case.gives, Refused) and case.gives.says == "means nothing"
        if isinstance(case.gives, (Decodes, Encodes)) or hint:
            reading.names.clear()
            request = read_request(case.verb, case.sent.query, case.sent.headers, bytearray(case.sent.body))
            read[request.verb] |= reading.names
            headers |= set(case.sent.headers)
    paths = document["paths"]
    assert query_parameters(paths["/{model}/decode"]["post"]) == read["decode"]
    assert query_parameters(paths["/{model}/encode"]["post"]) == read["encode"]
    for path in ("/", "/{model}"):
        assert query_parameters(paths[path]["post"]) == read["decode"] | read["encode"]
    for _, _, operation in operations(document):
        assert {one["name"] for one in operation["parameters"] if one["in"] == "header"} <= headers


def test_a_former_spelling_is_described_as_deprecated(document: dict[str, Any]) -> None:
    for path in ("/", "/{model}", "/{model}/decode", "/{model}/encode"):
        listed = {one["name"]: one for one in document["paths"][path]["post"]["parameters"]}
        assert listed["denormalised"]["deprecated"]
        assert listed["denormalised"]["schema"] == listed["denormalized"]["schema"]
        assert [name for name, one in listed.items() if one.get("deprecated")] == ["denormalised"]


def test_every_header_of_an_answer_is_described(document: dict[str, Any]) -> None:
    headers, _ = Result("tensor/binary", np.zeros(4, np.uint8), "uint8", (4,), Provenance("m", tiling="512")).to_http()
    for path in ("/", "/{model}", "/{model}/decode", "/{model}/encode"):
        described = document["paths"][path]["post"]["responses"]["200"]["headers"]
        assert set(headers) - {"content-type"} <= set(described)


def test_every_status_of_the_table_is_described_for_its_path(document: dict[str, Any]) -> None:
    for case in CASES.values():
        described = document["paths"].get(template_of(case))
        if described is None:  # a route that is not there: a 404 is all it can give
            assert case.gives.status == 404, case.name
            continue
        statuses = set[str]().union(*(operation["responses"] for operation in described.values()))
        assert str(case.gives.status) in statuses, case.name


def test_every_content_type_of_the_table_is_described_or_refused(document: dict[str, Any]) -> None:
    for case in CASES.values():
        operation = documented(document, case)
        sent = case.sent.headers.get("content-type", "").partition(";")[0].strip().lower()
        if operation is None or "requestBody" not in operation or not sent:
            continue
        listed = sent in operation["requestBody"]["content"]
        assert listed or case.gives.status == 415, case.name


def test_every_listed_content_type_is_sent_by_a_client(document: dict[str, Any]) -> None:
    sent: dict[str, set[str]] = {"decode": set(), "encode": set()}
    for case in CASES.values():
        if isinstance(case.gives, (Decodes, Encodes)):
            verb = "decode" if isinstance(case.gives, Decodes) else "encode"
            sent[verb].add(case.sent.headers.get("content-type", "").partition(";")[0].strip().lower())
    for verb, media in sent.items():
        assert set(document["paths"][f"/{{model}}/{verb}"]["post"]["requestBody"]["content"]) == media - {""}
    both = document["paths"]["/{model}"]["post"]["requestBody"]["content"]
    assert set(both) == (sent["decode"] | sent["encode"]) - {""}


def test_every_reply_of_the_table_is_described(document: dict[str, Any]) -> None:
    media = {"jpg": "image/jpeg", "png": "image/png", "mp4": "video/mp4"}
    for case in CASES.values():
        operation = documented(document, case)
        if not isinstance(case.gives, (Decodes, Encodes)):
            continue
        tensor = "tensor/base64" if case.gives.as_base64 else "tensor/binary"
        reply = media.get(case.gives.form, tensor) if isinstance(case.gives, Decodes) else tensor
        assert operation is not None
        assert reply in operation["responses"]["200"]["content"], case.name


def test_every_error_is_described_by_one_schema(document: dict[str, Any]) -> None:
    codes = document["components"]["schemas"]["Error"]["properties"]["code"]["enum"]
    assert codes == [error.code for error in SENT]
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            if status != "200":
                (schema,) = [content["schema"] for content in response["content"].values()]
                assert schema == {"$ref": "#/components/schemas/Error"}, (path, method, status)
    assert {case.gives.code for case in CASES.values() if isinstance(case.gives, Refused)} <= set(codes)
