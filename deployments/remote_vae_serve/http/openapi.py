"""`GET /openapi.json`: the routes of `http`, with the very parameters that the parser reads by."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from remote_vae import errors
from remote_vae.protocol import decode_request, encode_request
from remote_vae.protocol.messages import DEADLINE_HEADER, PICTURE_TYPES
from remote_vae.protocol.model_description import model_schema
from remote_vae.protocol.output import FILE_TYPES
from remote_vae.protocol.parameters import Parameter
from remote_vae.protocol.result import HEADERS

BINARY = {"schema": {"type": "string", "format": "binary"}}
IN_JSON = {
    "schema": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {"type": "string", "contentEncoding": "base64"},
            "parameters": {"type": "object", "description": "The query's parameters (application/json only)."},
        },
    }
}
TENSORS = {"tensor/binary": BINARY, "tensor/base64": IN_JSON}
BODIES = TENSORS | {"application/octet-stream": BINARY, "application/json": IN_JSON}
FILES = dict.fromkeys(sorted(FILE_TYPES), BINARY)
PICTURES = dict.fromkeys(PICTURE_TYPES, BINARY)
MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
WAITING = {
    "name": "waiting", "in": "query", "required": False, "schema": {"type": "string"},
    "description": "The `x-request-id` of a request that waits: `ahead` says how many come before it.",
}  # fmt: skip
REPLY_HEADERS = {
    name: {"schema": {"type": "string"}, "description": meaning}
    for name, meaning in ({"x-request-id": "Of this exchange; the server's log knows it."} | HEADERS).items()
}
OBJECT = {"type": "object"}
DESCRIPTION = {"$ref": "#/components/schemas/Model"}
DESCRIPTIONS = {
    "type": "object",
    "required": ["models"],
    "properties": {"models": {"type": "array", "items": DESCRIPTION}},
}
DEADLINE = {
    "name": DEADLINE_HEADER, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 1},
    "description": "Milliseconds for which the client waits; later nothing is decoded for it.",
}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    """The description of this server's HTTP interface, OpenAPI 3.1."""
    decode = _post(
        "Decode latents.",
        decode_request.PARAMETERS,
        BODIES,
        TENSORS | FILES,
    )
    encode = _post(
        "Encode a picture, pictures or a video.",
        encode_request.PARAMETERS,
        BODIES | PICTURES,
        TENSORS,
    )
    either = decode | {
        "summary": "Decode latents; or encode, where no output_type and no tensor Content-Type was sent and the body is a "
        "picture, or a tensor of three channels.",
        "parameters": _distinct(decode["parameters"] + encode["parameters"]),
        "requestBody": {
            "required": True,
            "content": decode["requestBody"]["content"] | encode["requestBody"]["content"],
        },
    }
    by_host = either | {
        "summary": "The same, by the model that the request's Host stands for: for clients that know a host and no path.",
        "parameters": [one for one in either["parameters"] if one is not MODEL],
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "remote-vae", "version": "1", "description": "The Hugging Face Remote VAE protocol."},
        "paths": {
            "/": {"post": by_host},
            "/{model}": {
                "get": _get("Describe a model; starts no replica.", DESCRIPTION, MODEL, WAITING),
                "post": either,
            },
            "/{model}/decode": {"post": decode},
            "/{model}/encode": {"post": encode},
            "/{model}/describe": {
                "post": _get("Describe a model by a replica, started where there is none.", DESCRIPTION, MODEL)
            },
            "/models": {"get": _get("Describe all models; starts no replica.", DESCRIPTIONS)},
            "/health": {"get": _get("200 when requests can be served.", OBJECT)},
            "/openapi.json": {"get": _get("This document.", OBJECT)},
        },
        "components": {"schemas": {"Error": _error_schema(), "Model": model_schema()}},
    }


def _post(summary: str, parameters: Iterable[Parameter[Any]], bodies: Any, replies: Any) -> dict[str, Any]:
    return {
        "summary": summary,
        "parameters": [MODEL, DEADLINE, *(one for parameter in parameters for one in _parameters(parameter))],
        "requestBody": {"required": True, "content": bodies},
        "responses": {"200": {"description": "The result.", "headers": REPLY_HEADERS, "content": replies}} | _errors(),
    }


def _get(summary: str, schema: Any, *parameters: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": {"description": "A JSON object.", "content": content}} | _errors(),
    }


def _parameters(parameter: Parameter[Any]) -> list[dict[str, Any]]:
    """The parameter, and each of its aliases as one that is deprecated."""
    described = {
        "name": parameter.name,
        "in": "query",
        "required": False,  # v0 has them in its body, and a picture needs neither shape nor dtype
        "description": parameter.meaning,
        "schema": dict(parameter.schema),
    }
    deprecated = {"description": f"Former spelling of {parameter.name}.", "deprecated": True}
    return [described, *(described | deprecated | {"name": alias} for alias in parameter.aliases)]


def _distinct(parameters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decode's word stands where both have a parameter; its schema is widened to what either takes."""
    by_name: dict[str, dict[str, Any]] = {}
    for parameter in parameters:
        known = by_name.setdefault(parameter["name"], parameter)
        if known["schema"] != parameter["schema"]:
            by_name[parameter["name"]] = parameter  # `dtype`: encode also takes uint8
    return list(by_name.values())


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    statuses = sorted({error.status for error in errors.SENT})
    return {
        str(status): {
            "description": ", ".join(error.code for error in errors.SENT if error.status == status),
            "content": content,
        }
        for status in statuses
    }


def _error_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["error", "code", "request_id"],
        "properties": {
            "error": {"type": "string", "description": "A sentence that says what to do."},
            "code": {"type": "string", "enum": [error.code for error in errors.SENT]},
            "request_id": {"type": ["string", "null"]},
            "parameter": {"type": "string", "description": "Which parameter is at fault."},
        },
    }
