"""`ModelDescription` is what the server writes, what clients read, and what documents say of both. `python
tests/unit/test_model_description.py` writes the table of its fields into docs/operate.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jsonschema
import pytest
from starlette.testclient import TestClient

from remote_vae import AsyncRemoteVAE, RemoteVAE
from remote_vae.errors import BrokenReply
from remote_vae.protocol.model_description import FIELDS, NULLABLE, ModelDescription, model_schema
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.http.app import create_app, create_model_app
from remote_vae_serve.http.openapi import document
from remote_vae_serve.ingress.application_details import described_by
from remote_vae_serve.ingress.model_registry import Model
from remote_vae_serve.replica import replica
from remote_vae_serve.replica.description import describe_arguments
from remote_vae_serve.replica.replica import VAE, SingleModel
from samples import save_tiny_vae
from scripted_server import Exchange, ScriptedServer

DOCS = Path(__file__).parents[2] / "docs" / "operate.md"
OF_THE_ARGUMENTS = ("protocol", "source", "dtype", "encode_dtype", "device", "num_gpus")
OF_A_LOADED_MODEL = (
    "revision", "startup", "gpu_ids", "encode", "class", "family", "latents", "latent_channels", "spatial_ratio",
    "temporal_ratio", "video", "scaling_factor", "shift_factor", "hints", "application_hints", "config",
)  # fmt: skip
ONE_OF_EACH: dict[str, Any] = {
    "string": "word",
    "integer": 2,
    "number": 0.5,
    "boolean": True,
    "object": {},
    "array": [],
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VAE]:
    """A replica of a tiny model, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="sd", replica_tag="sd"))
        patch.setattr(replica, "EventCounters", Mock())
        patch.setattr(replica.ray, "get_gpu_ids", list)
        source = save_tiny_vae("sd", tmp_path_factory.mktemp("sd"))
        yield VAE(VAEConfig(source=str(source), device="cpu", num_gpus=0, threads=1))


@pytest.fixture(scope="module")
def missing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VAE]:
    """A replica whose model cannot be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="gone", replica_tag="gone")
        )
        patch.setattr(replica, "EventCounters", Mock())
        patch.setattr(replica.ray, "get_gpu_ids", list)
        yield VAE(VAEConfig(source=str(tmp_path_factory.mktemp("gone")), device="cpu", num_gpus=0))


# What is on the wire


def test_a_replica_says_all_of_a_loaded_model_and_null_where_it_has_none(vae: VAE) -> None:
    plain = asyncio.run(vae.describe())
    assert set(plain) == {*OF_THE_ARGUMENTS, *OF_A_LOADED_MODEL, "name", "state"}
    assert (plain["name"], plain["state"], plain["protocol"]) == ("sd", "ready", PROTOCOL)
    assert (plain["class"], plain["encode"], plain["latent_channels"]) == ("AutoencoderKL", "moments", 4)
    assert {name for name, value in plain.items() if value is None} == {"temporal_ratio", "shift_factor"}
    assert (plain["num_gpus"], plain["gpu_ids"], plain["application_hints"]) == (0, [], {})
    assert isinstance(plain["latents"], list)
    assert plain["config"]["_class_name"] == "AutoencoderKL"


def test_a_model_that_cannot_be_loaded_says_why_and_nothing_that_only_a_loaded_one_knows(missing: VAE) -> None:
    plain = asyncio.run(missing.describe(wake=True))
    assert set(plain) == {*OF_THE_ARGUMENTS, "name", "state", "reason"}
    assert plain["state"] == "failed"
    assert "config.json" in plain["reason"]


def test_every_door_says_the_same(vae: VAE) -> None:
    models, plain = SingleModel(vae), asyncio.run(vae.describe())
    whole = TestClient(create_app(models, 1, 5))
    direct = TestClient(create_model_app("sd", models, 1, 5))
    assert whole.get("/models").json() == {"models": [plain]}
    assert whole.get("/sd").json() == whole.post("/sd/describe").json() == plain
    assert direct.get("/").json() == direct.post("/describe").json() == plain


def test_what_a_replica_reported_stands_over_the_arguments_and_serve_has_the_last_word(vae: VAE) -> None:
    arguments = describe_arguments(VAEConfig(source="org/model", variant="fp16", dtype="float32", num_gpus=1))
    reported = ModelDescription(dtype="float16", state="ready", temporal_ratio=None, nulls=NULLABLE)
    assert Model("sd", "cold", arguments).describe().to_plain() == {
        **arguments.to_plain(), "name": "sd", "state": "cold"
    }  # fmt: skip
    starting = Model("sd", "starting", arguments, "waits for 1 GPU", reported=reported).describe().to_plain()
    assert starting == {
        **arguments.to_plain(), "name": "sd", "state": "starting", "reason": "waits for 1 GPU", "dtype": "float16",
        "encode": None, "temporal_ratio": None, "scaling_factor": None, "shift_factor": None,
    }  # fmt: skip


def test_a_builder_that_refused_its_arguments_leaves_those_that_can_be_read() -> None:
    described = described_by(
        {"source": "demo", "variant": 16, "num_gpus": "auto", "sorce": "x", "fake": {"channels": 4}}
    )
    assert described.to_plain() == {"source": "demo", "num_gpus": "auto", "sorce": "x"}


# Reading


def test_a_description_is_read_as_it_was_written(vae: VAE, missing: VAE) -> None:
    cold = describe_arguments(VAEConfig(source="demo", revision="abc", subfolder="vae"))
    for description in (vae.description(), missing.description(), cold, ModelDescription()):
        sent = json.loads(json.dumps(description.to_plain()))
        assert sent == description.to_plain()
        assert ModelDescription.from_plain(sent) == description


def test_null_and_nothing_said_are_both_none_and_stay_apart() -> None:
    image, asleep = ModelDescription.from_plain({"temporal_ratio": None}), ModelDescription.from_plain({})
    assert image.temporal_ratio is None
    assert asleep.temporal_ratio is None
    assert (image.to_plain(), asleep.to_plain()) == ({"temporal_ratio": None}, {})
    assert ModelDescription(temporal_ratio=4, nulls=NULLABLE).or_else(image).to_plain()["temporal_ratio"] == 4
    assert image.or_else(ModelDescription(temporal_ratio=4)).to_plain() == {"temporal_ratio": None}


def test_what_a_newer_server_says_besides_is_kept_aside(vae: VAE) -> None:
    new = {"throughput": {"images_per_s": 3.5}, "nulls": 1, "extra": None, "class_name": "no name on the wire"}
    plain = asyncio.run(vae.describe()) | new
    description = ModelDescription.from_plain(plain)
    assert description.extra == new
    assert (description.class_name, description.latent_channels) == ("AutoencoderKL", 4)
    assert description.to_plain() == plain


def test_a_word_that_only_a_newer_server_knows_is_read() -> None:
    assert ModelDescription.from_plain({"state": "draining", "encode": "tokens"}).state == "draining"


@pytest.mark.parametrize("known", FIELDS, ids=lambda known: known.name)
def test_a_field_of_a_wrong_type_is_named(known: Any) -> None:
    """And the schema is of the same mind."""
    types = known.schema["type"] if isinstance(known.schema["type"], list) else [known.schema["type"]]
    schema = {**model_schema(), "required": []}
    for kind, value in {**ONE_OF_EACH, "null": None}.items():
        if kind in types or (kind == "integer" and "number" in types):
            if "enum" not in known.schema:
                jsonschema.validate({known.name: value}, schema)
            assert ModelDescription.from_plain({known.name: value}).to_plain() == {known.name: value}
            continue
        with pytest.raises(BrokenReply, match=f"its {known.name} is .*; expected {known.kind}"):
            ModelDescription.from_plain({known.name: value})
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({known.name: value}, schema)


@pytest.mark.parametrize(
    ("name", "value"),
    [("latents", ["[B, 4, h, w]", 4]), ("gpu_ids", [0.5]), ("hints", {"seed": 1}), ("startup", {"began": "now"}),
     ("application_hints", {"layers": [1]})],
)  # fmt: skip
def test_so_is_one_that_holds_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(BrokenReply, match=f"its {name} is"):
        ModelDescription.from_plain({name: value})


@pytest.mark.parametrize("plain", [None, [], "ready", 1])
def test_what_is_no_description_is_a_broken_reply(plain: Any) -> None:
    with pytest.raises(BrokenReply, match="expected an object"):
        ModelDescription.from_plain(plain)


def test_a_config_may_hold_anything_however_deep() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert ModelDescription.from_plain({"config": {"deep": deep}}).config is not None


def test_a_description_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelDescription().name = "other"  # type: ignore[misc]


def test_both_clients_have_it_plain_and_typed() -> None:
    said = {"name": "model", "state": "ready", "latents": ["[B, 4, h, w]"], "encode": None, "new": 1}

    def answer(exchange: Exchange) -> None:
        exchange.reply(200, {"content-type": "application/json"}, json.dumps(said).encode())

    async def run(url: str) -> tuple[dict[str, Any], ModelDescription]:
        async with AsyncRemoteVAE(url) as vae:
            return await vae.describe(), await vae.description()

    with ScriptedServer(answer) as server, RemoteVAE(server.url) as vae:
        assert vae.describe()["latents"] == ["[B, 4, h, w]"]
        assert (vae.describe(), vae.description()) == (said, ModelDescription.from_plain(said))
        assert asyncio.run(run(server.url)) == (said, ModelDescription.from_plain(said))
        said["latent_channels"] = "four"
        with pytest.raises(BrokenReply, match="latent_channels is 'four'; expected integer"):
            vae.describe()


# What documents say


def test_every_field_says_what_it_means() -> None:
    assert [known.attribute for known in FIELDS] + ["nulls", "extra"] == [one.name for one in fields(ModelDescription)]
    for known in FIELDS:
        assert known.meaning.endswith("."), known.name
        assert ("null" in known.meaning) == (known.attribute in NULLABLE), known.name


def test_what_a_server_says_is_what_its_schema_says(vae: VAE, missing: VAE) -> None:
    schema = model_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for description in (vae.description(), missing.description()):
        jsonschema.validate(description.to_plain(), schema)
        assert description.to_plain().keys() <= schema["properties"].keys()
    with pytest.raises(jsonschema.ValidationError, match="'state' is a required property"):
        jsonschema.validate({"name": "sd"}, schema)


def test_openapi_has_the_schema_wherever_a_model_is_described() -> None:
    described = document()
    assert described["components"]["schemas"]["Model"] == model_schema()

    def answer(path: str, method: str) -> Any:
        return described["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]

    model = {"$ref": "#/components/schemas/Model"}
    assert answer("/{model}", "get") == answer("/{model}/describe", "post") == model
    assert answer("/models", "get")["properties"]["models"] == {"type": "array", "items": model}


BEGIN, END = "<!-- table: description -->", "<!-- end of the description -->"


def with_table(page: str) -> str:
    """The page with the fields of today between its marks."""
    rows = [f"| `{known.name}` | {known.kind} | {known.meaning} |" for known in FIELDS]
    table = "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])
    before, _, after = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after.partition(END)[2]}"


def test_the_docs_list_the_fields_as_they_are_declared() -> None:
    page = DOCS.read_text()
    assert page == with_table(page), "run: python tests/unit/test_model_description.py"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
