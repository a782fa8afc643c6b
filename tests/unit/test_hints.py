"""`Hints`: what only a human can say of latents, from where it is said to where it is read."""

from __future__ import annotations

import asyncio
import inspect
import json
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from remote_vae import AsyncRemoteVAE, RemoteVAE, remote_decode, remote_encode
from remote_vae.calls.decode_call import DecodeCall
from remote_vae.errors import BadRequest
from remote_vae.protocol import hints
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.hints import PARAMETERS, EncodeHintArguments, HintArguments, Hints
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.parameters import collect
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae.transports.transport import Transport
from samples import latents

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"
NAMES = [field.name for field in fields(Hints)]
Z = latents(1, 4, 2, 3)
PIXELS = np.zeros((1, 3, 8, 8), np.float32)
GOOD: dict[str, list[Any]] = {
    "num_frames": [1, 25, 2**20], "layers": [1, 4, 2**20], "drop_frames": [0, 2, 2**20],
    "layout": ["channels_first", "channels_last", "frames_first"], "patch_order": ["c_ph_pw", "ph_pw_c"],
    "denormalized": [True, False], "sigma_data": [0.5, 1e-9, 1.0], "decode_timestep": [0.0, 0.05, 1.0],
    "decode_noise_scale": [0.0, 0.025, 1.0], "decode_chunk_size": [1, 14, 2**20], "force_not_quantize": [True, False],
    "seed": [0, 7, 2**63 - 1],
}  # fmt: skip
NO_NUMBER: list[Any] = ["7", b"7", True, [7], float("nan"), float("inf"), np.ones(2)]
BAD: dict[str, list[Any]] = {
    "num_frames": [0, -1, 2**20 + 1, 2.0, 10**400, *NO_NUMBER], "layers": [0, 1.5, *NO_NUMBER],
    "drop_frames": [-1, 2**20 + 1, *NO_NUMBER], "layout": ["", "Channels_Last", "bchw", 1, True, ["channels_last"], np.ones(2)],
    "patch_order": ["ph_c_pw", 0, ("c_ph_pw",)], "denormalized": [1, 0, "True", "false", 1.0, np.ones(2)],
    "sigma_data": [0, 0.0, -1.0, 10**400, *NO_NUMBER], "decode_timestep": [-0.01, 1.01, *NO_NUMBER],
    "decode_noise_scale": [-1e-9, 2, *NO_NUMBER], "decode_chunk_size": [0, *NO_NUMBER], "force_not_quantize": ["yes", 2],
    "seed": [-1, 2**63, 1.0, *NO_NUMBER],
}  # fmt: skip
ALL = {name: values[-1] for name, values in GOOD.items()}
EACH = pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])


def test_each_field_is_declared_once_and_has_the_same_name_everywhere() -> None:
    assert [parameter.name for parameter in PARAMETERS] == NAMES == list(GOOD) == list(BAD)
    for_decode, for_encode = (typing.get_type_hints(kind) for kind in (HintArguments, EncodeHintArguments))
    aliases = {alias: parameter.name for parameter in PARAMETERS for alias in parameter.aliases}
    of_fields = typing.get_type_hints(Hints)
    assert for_decode == of_fields | {alias: of_fields[name] for alias, name in aliases.items()}
    assert {**for_encode, "seed": for_decode["seed"]} == for_decode
    assert [parameter.name for parameter in hints.ENCODE_PARAMETERS] == NAMES[:-1]


@EACH
def test_what_is_said_is_read_again_from_a_query_and_from_plain_values(name: str, value: Any) -> None:
    said = Hints(**{name: value})
    assert said.given() == (name,)
    assert said.to_plain() == {name: value}
    assert type(said.to_plain()[name]) is type(value)
    assert Hints.of(collect(said.to_query())) == said
    assert Hints.from_plain(json.loads(json.dumps(said.to_plain()))) == said


@EACH
def test_what_is_accepted_is_what_its_schema_says(name: str, value: Any) -> None:
    (schema,) = [parameter.schema for parameter in PARAMETERS if parameter.name == name]
    jsonschema.Draft202012Validator(dict(schema)).validate(value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=repr
)
def test_a_value_that_is_none_is_refused_with_its_name_and_what_is_expected(name: str, value: Any) -> None:
    with pytest.raises(
        BadRequest, match=rf"^{name} is .*; expected (one of|True or False|a (whole )?number)"
    ) as caught:
        Hints(**{name: value})
    assert caught.value.parameter == name
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("name", NAMES)
def test_a_word_that_is_no_value_is_refused_in_a_query_too(name: str) -> None:
    for written in ("", "many", "nan", "1e400", "-1", "7;8"):
        with pytest.raises(BadRequest) as caught:
            Hints.of({name: [written]})
        assert caught.value.parameter == name


OLD, NEW = "denormalised", "denormalized"


@pytest.mark.parametrize("read", [Hints.from_plain, Hints.of_arguments])
@pytest.mark.parametrize("value", [True, False])
def test_a_former_spelling_is_read_everywhere_and_is_what_travels(read: Any, value: bool) -> None:
    """A server of before the new spelling refuses it, so the old one is sent, on either door."""
    hints = Hints(denormalized=value)
    assert (
        read({OLD: value})
        == read({NEW: value})
        == read({OLD: value, NEW: value})
        == read({OLD: value, NEW: None})
        == hints
    )
    assert (hints.to_wire(), hints.to_plain(), hints.given()) == ({OLD: value}, {NEW: value}, (NEW,))
    assert hints.to_query() == [(OLD, str(value))]
    assert Hints.of({OLD: [str(value)]}) == Hints.of({NEW: [str(value)]}) == hints
    for request in (DecodeRequest(from_array(Z), hints=hints), EncodeRequest(from_array(PIXELS), hints=hints)):
        assert request.to_plain()[-3] == {OLD: value}
        assert (OLD, str(value)) in request.to_http()[0]
        assert type(request).from_plain(request.to_plain()).hints == hints


def test_two_spellings_that_differ_are_refused() -> None:
    for read in (Hints.from_plain, Hints.of_arguments):
        with pytest.raises(BadRequest, match="denormalized and denormalised are one parameter") as caught:
            read({OLD: True, NEW: False})
        assert caught.value.parameter == NEW
    with pytest.raises(BadRequest, match="are one parameter"):
        Hints.of({OLD: ["true"], NEW: ["0"]})


def test_numbers_of_other_libraries_become_pythons() -> None:
    said = Hints(num_frames=np.int64(9), sigma_data=np.float32(0.5), seed=torch.tensor(3), decode_timestep=1)  # type: ignore[arg-type]
    assert said == Hints(num_frames=9, sigma_data=0.5, seed=3, decode_timestep=1.0)
    assert [type(value) for value in said.to_plain().values()] == [int, float, float, int]


def test_nothing_said_is_nothing_sent() -> None:
    assert (Hints().given(), Hints().to_query(), Hints().to_plain()) == ((), [], {})
    assert Hints.of({}) == Hints.from_plain({}) == Hints(**dict.fromkeys(NAMES))


def test_what_one_leaves_out_the_other_says() -> None:
    mine, defaults = (
        Hints(num_frames=9, denormalized=False, drop_frames=0),
        Hints(num_frames=1, denormalized=True, seed=3),
    )
    assert mine.or_else(defaults) == Hints(num_frames=9, denormalized=False, drop_frames=0, seed=3)
    assert Hints().or_else(mine) == mine.or_else(Hints()) == mine


def test_hints_said_stand_in_the_order_of_the_fields() -> None:
    assert Hints(**dict(reversed(ALL.items()))).given() == tuple(NAMES)


def test_a_plain_hint_of_no_known_name_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadRequest, match="nmu_frames is no hint; expected one of num_frames, layers") as caught:
        Hints.from_plain({"nmu_frames": 3})
    assert caught.value.parameter == "nmu_frames"


class Keeping(Transport):
    """Keeps what it is to send, and answers with the latents or pixels themselves."""

    def __init__(self) -> None:
        self.sent: list[Request] = []

    def try_one(self, request: Request) -> Result:
        self.sent.append(request)
        raw = request.latents if isinstance(request, DecodeRequest) else request.image
        return Result("tensor/binary", raw.data, raw.dtype, raw.shape)  # type: ignore[union-attr]

    async def try_one_async(self, request: Request) -> Result:
        return self.try_one(request)

    def describe(self, wake: bool = False) -> ModelDescription:
        return ModelDescription()

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        return ModelDescription()


def in_async(verb: str, endpoint: Any, tensor: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncRemoteVAE(endpoint) as vae:
            return await getattr(vae, verb)(tensor, **options)

    return asyncio.run(run())


DECODES: dict[str, Any] = {
    "function": remote_decode,
    "class": lambda endpoint, z, **options: RemoteVAE(endpoint).decode(z, **options),
    "submit": lambda endpoint, z, **options: RemoteVAE(endpoint).submit(z, **options).result(),
    "async": lambda endpoint, z, **options: in_async("decode", endpoint, z, **options),
}
ENCODES: dict[str, Any] = {
    "function": remote_encode,
    "class": lambda endpoint, x, **options: RemoteVAE(endpoint).encode(x, **options),
    "async": lambda endpoint, x, **options: in_async("encode", endpoint, x, **options),
}


@pytest.mark.parametrize("way", DECODES)
def test_every_way_to_decode_takes_every_hint(way: str) -> None:
    transport = Keeping()
    DECODES[way](transport, Z, output_type="pt", **ALL)
    assert [request.hints for request in transport.sent] == [Hints(**ALL)]


@pytest.mark.parametrize("ways", [DECODES, ENCODES])
def test_every_way_takes_a_former_spelling(ways: dict[str, Any]) -> None:
    options = {"output_type": "pt"} if ways is DECODES else {}
    for call in ways.values():
        transport = Keeping()
        call(transport, PIXELS, denormalised=True, **options)
        assert [request.hints for request in transport.sent] == [Hints(denormalized=True)]


@pytest.mark.parametrize("way", ENCODES)
def test_every_way_to_encode_takes_every_hint_and_keeps_the_seed_of_its_sample(way: str) -> None:
    transport = Keeping()
    ENCODES[way](transport, PIXELS, **ALL)
    (request,) = transport.sent
    assert isinstance(request, EncodeRequest)
    assert (request.hints, request.seed) == (Hints(**{**ALL, "seed": None}), ALL["seed"])


@pytest.mark.parametrize(
    "call", [*DECODES.values(), *ENCODES.values()], ids=[*DECODES, *(f"encode {w}" for w in ENCODES)]
)
def test_a_name_that_is_no_hint_is_a_type_error_with_the_name_and_nothing_is_sent(call: Any) -> None:
    transport = Keeping()
    with pytest.raises(TypeError, match="unexpected keyword argument 'nmu_frames'"):
        call(transport, PIXELS, nmu_frames=3)
    with pytest.raises(BadRequest, match="num_frames is 0"):
        call(transport, PIXELS, num_frames=0)
    assert not transport.sent


def test_each_picture_of_a_batch_is_sent_with_the_hints() -> None:
    requests = DecodeCall(latents(3, 4, 2, 2), hints=Hints(denormalized=True)).requests()
    assert [request.hints for request in requests] == [Hints(denormalized=True)] * 3


def test_an_encode_reads_the_seed_once_and_as_its_own() -> None:
    request = EncodeRequest(from_array(PIXELS), seed=3, hints=Hints(seed=4, sigma_data=0.5))
    query, headers, body = request.to_http()
    assert [value for name, value in query if name == "seed"] == ["3"]
    read = EncodeRequest.from_http(query, headers, body)
    assert (read.seed, read.hints) == (3, Hints(sigma_data=0.5))
    assert EncodeRequest.from_plain(request.to_plain()).hints == Hints(sigma_data=0.5)


@pytest.mark.parametrize("function", [remote_decode, RemoteVAE.decode, AsyncRemoteVAE.decode])
def test_an_editor_is_told_which_names_there_are(function: Any) -> None:
    last = list(inspect.signature(function).parameters.values())[-1]
    assert (last.kind, last.annotation) == (inspect.Parameter.VAR_KEYWORD, "Unpack[HintArguments]")


def table() -> str:
    """The hints in Markdown, as docs/clients.md has them."""
    lines = ["| hint | values | meaning |", "| --- | --- | --- |"]
    for parameter in PARAMETERS:
        schema = parameter.schema
        values = ", ".join(f"`{word}`" for word in schema["enum"]) if "enum" in schema else schema["type"]
        lines.append(f"| `{parameter.name}` | {values} | {parameter.meaning} |")
    return "\n".join(lines)


BEGIN, END = "<!-- table: hints -->", "<!-- end of the hints -->"


def with_table(page: str) -> str:
    """The page with the table of today between its marks."""
    before, _, after = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after.partition(END)[2]}"


def test_the_docs_list_the_hints_as_they_are_declared() -> None:
    page = DOCS.read_text()
    assert page == with_table(page), "run: python tests/unit/test_hints.py"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
