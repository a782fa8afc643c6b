"""What goes over the wire, in both directions and through both doors, and what clients of other makes send."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import remote_utils

from remote_vae.errors import BadRequest, BrokenReply, ProtocolMismatch, UnknownContentType
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Provenance, Result
from remote_vae.protocol.tensors import RawTensor, from_array, to_torch
from remote_vae.protocol.wire import PROTOCOL, Scaling
from samples import latents

LATENTS = latents(1, 4, 2, 2)
SHAPE = [("shape", "1"), ("shape", "4"), ("shape", "2"), ("shape", "2")]
BINARY = {"content-type": "tensor/binary"}
BODY = LATENTS.numpy().tobytes()


def read(*query: tuple[str, str], accept: str = "*/*", body: Any = BODY, **headers: str) -> DecodeRequest:
    """What the server reads out of a good request with these parameters added."""
    all_headers = BINARY | {"accept": accept} | {name.replace("_", "-"): value for name, value in headers.items()}
    return DecodeRequest.from_http([*SHAPE, ("dtype", "float32"), *query], all_headers, body)


def said(request: DecodeRequest) -> tuple[Any, ...]:
    """Everything in a request, comparable."""
    raw = request.latents
    return (
        raw.data.tobytes(), raw.dtype, raw.shape, request.scaling, request.output,
        request.height, request.width, request.fps, request.hints, request.body, request.reply,
    )  # fmt: skip


REQUESTS = {
    "plain": DecodeRequest(from_array(LATENTS)),
    "own scaling": DecodeRequest(from_array(LATENTS), Scaling(own=True)),
    "factor": DecodeRequest(from_array(LATENTS), Scaling(factor=0.18215)),
    "shift": DecodeRequest(from_array(LATENTS), Scaling(shift=-0.1)),
    "both": DecodeRequest(from_array(LATENTS), Scaling(factor=1 / 3, shift=1e-8)),
    "packed": DecodeRequest(from_array(latents(1, 6, 16)), height=32, width=48),
    "half": DecodeRequest(from_array(LATENTS.half())),
    "bfloat16": DecodeRequest(from_array(LATENTS.bfloat16())),
    "base64": DecodeRequest(from_array(LATENTS), output=Output.PT, body="base64", reply="base64"),
    "video": DecodeRequest(from_array(latents(1, 4, 3, 2, 2)), output=Output.MP4, fps=23.976),
    "hints": DecodeRequest(
        from_array(LATENTS), fps=8, hints=Hints(num_frames=9, layout="frames_first", sigma_data=0.1, seed=0)
    ),
    "hints that say no": DecodeRequest(from_array(LATENTS), hints=Hints(denormalized=False, decode_timestep=0.0)),
    **{output.value: DecodeRequest(from_array(LATENTS), output=output) for output in Output},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_over_http_is_read_as_it_was_written(name: str) -> None:
    request = REQUESTS[name]
    assert said(DecodeRequest.from_http(*request.to_http())) == said(request)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_over_a_handle_is_read_as_it_was_written(name: str) -> None:
    request = REQUESTS[name]
    as_binary = (*said(request)[:-2], "binary", "binary")  # base64 is a matter of HTTP
    assert said(DecodeRequest.from_plain(request.to_plain())) == as_binary


def test_what_crosses_a_handle_is_plain() -> None:
    """Numpy and builtins alone: no class of ours to unpickle, no torch tensor, which is slow to cross."""

    def kinds(value: Any) -> set[type]:
        inside = (*value, *value.values()) if type(value) is dict else value if type(value) is tuple else None
        return {type(value)} if inside is None else set.union(set(), *map(kinds, inside))

    plain = [request.to_plain() for request in REQUESTS.values()]
    plain.append(
        Result("image/png", np.zeros(3, np.uint8), provenance=Provenance("m", "r", "d", (("decode", 1.0),))).to_plain()
    )
    assert set.union(*map(kinds, plain)) <= {int, float, str, bool, type(None), np.ndarray}


SPELLINGS = {
    "repeated keys": SHAPE,
    "a JSON list": [("shape", "[1, 4, 2, 2]")],
    "a comma list": [("shape", "1,4,2,2")],
    "a tuple": [("shape", "(1, 4, 2, 2)")],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_list_is_understood_in_every_spelling(spelling: str) -> None:
    request = DecodeRequest.from_http([*SPELLINGS[spelling], ("dtype", "float32")], BINARY, BODY)
    assert request.latents.shape == (1, 4, 2, 2)


@pytest.mark.parametrize("true", ["True", "true", "TRUE", "1"])
@pytest.mark.parametrize("false", ["False", "false", "FALSE", "0"])
def test_a_bool_is_understood_in_any_case(true: str, false: str) -> None:
    assert read(("do_scaling", true)).scaling == Scaling(own=True)
    assert read(("do_scaling", false)).scaling == Scaling()


OWN = Scaling(own=True)


@pytest.mark.parametrize(
    ("query", "scaling"),
    [
        ({}, Scaling()),
        ({"do_scaling": "True"}, OWN),
        ({"do_scaling": "False"}, Scaling()),
        ({"do_scaling": "False", "scaling_factor": "2", "shift_factor": "1"}, Scaling()),
        ({"scaling_factor": "2"}, Scaling(factor=2)),
        ({"shift_factor": "1"}, Scaling(shift=1)),
        ({"scaling_factor": "2", "shift_factor": "0"}, Scaling(factor=2, shift=0)),
        ({"do_scaling": "True", "scaling_factor": "2"}, Scaling(factor=2)),
        ({"do_scaling": "True", "shift_factor": "1"}, Scaling(shift=1)),
    ],
    ids=str,
)
def test_scaling_is_refused_then_given_then_the_models_own_then_none(query: dict[str, str], scaling: Scaling) -> None:
    assert read(*query.items()).scaling == scaling


@pytest.mark.parametrize(
    ("query", "accept", "output"),
    [
        ({}, "*/*", Output.JPEG),
        ({}, "", Output.JPEG),
        ({}, "image/jpeg", Output.JPEG),
        ({}, "image/png", Output.PNG),
        ({}, "IMAGE/PNG; q=0.9", Output.PNG),
        ({"image_format": "png"}, "*/*", Output.PNG),
        ({"image_format": "png"}, "image/jpeg", Output.PNG),
        ({"image_format": "jpg"}, "image/png", Output.JPEG),
        ({"image_format": "jpeg"}, "*/*", Output.JPEG),
        ({"output_type": "pil"}, "tensor/binary", Output.UNIT),
        ({"output_type": "pil", "image_format": "png"}, "tensor/base64", Output.UNIT),
        ({"output_type": "pt"}, "tensor/binary", Output.PT),
        ({"output_type": "pt"}, "image/png", Output.PT),
        ({"output_type": "pt", "partial_postprocess": "True"}, "tensor/binary", Output.UINT8),
        ({"output_type": "mp4"}, "text/plain", Output.MP4),
        ({"output_type": "mp4"}, "tensor/binary", Output.MP4),
    ],
    ids=str,
)
def test_output_type_says_what_and_accept_how(query: dict[str, str], accept: str, output: Output) -> None:
    assert read(*query.items(), accept=accept).output is output


def test_unknown_keys_are_ignored() -> None:
    extras = [("input_tensor_type", "binary"), ("output_tensor_type", "binary"), ("from_the_future", "{}")]
    assert said(read(*extras)) == said(read())


@pytest.mark.parametrize(
    "content_type",
    ["tensor/binary", "Tensor/Binary; charset=utf-8", "application/octet-stream", ""],
)
def test_a_raw_body_is_known_by_its_type_without_case_and_parameters(content_type: str) -> None:
    assert torch.equal(to_torch(read(content_type=content_type).latents), LATENTS)


def test_the_first_clients_base64_is_understood_both_ways() -> None:
    body = json.dumps({"inputs": base64.b64encode(BODY).decode()}).encode()
    request = read(("output_type", "pt"), accept="tensor/base64", content_type="tensor/base64", body=body)
    assert torch.equal(to_torch(request.latents), LATENTS)
    assert (request.body, request.reply) == ("base64", "base64")


@pytest.mark.parametrize("content_type", ["text/html", "image/png", "tensor/binaries", "multipart/form-data"])
def test_a_body_of_unknown_type_is_refused(content_type: str) -> None:
    with pytest.raises(UnknownContentType, match=content_type):
        read(content_type=content_type)


HUGGING_FACE = {
    "nothing": ({}, OWN, Output.JPEG),
    "no scaling": ({"do_scaling": False}, Scaling(), Output.JPEG),
    "a factor": ({"scaling_factor": 0.18215}, Scaling(factor=0.18215), Output.JPEG),
    "a shift": ({"shift_factor": 0.1}, Scaling(shift=0.1), Output.JPEG),
    "both": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, Scaling(factor=0.3611, shift=0.1159), Output.JPEG),
    "png": ({"image_format": "png"}, OWN, Output.PNG),
    "a processor": ({"processor": VaeImageProcessor()}, OWN, Output.UNIT),
    "pt": ({"output_type": "pt"}, OWN, Output.PT),
    "pt with a processor": ({"output_type": "pt", "processor": VaeImageProcessor()}, OWN, Output.PT),
    "uint8": ({"output_type": "pt", "partial_postprocess": True}, OWN, Output.UINT8),
    "mp4": ({"output_type": "mp4"}, OWN, Output.MP4),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_what_the_hugging_face_helper_sends_is_understood(case: str, dtype: torch.dtype) -> None:
    arguments, scaling, output = HUGGING_FACE[case]
    packed = latents(1, 6, 16).to(dtype)
    sent = remote_utils.prepare_decode(packed, height=32, width=48, **arguments)
    post = requests.Request("POST", "http://host/sd", **sent).prepare()
    headers = {name.lower(): value for name, value in post.headers.items()}
    request = DecodeRequest.from_http(parse_qsl(urlsplit(post.url).query), headers, post.body)
    assert torch.equal(to_torch(request.latents), packed)
    assert (request.scaling, request.output, request.height, request.width) == (scaling, output, 32, 48)


PROVENANCE = Provenance("sd", "abc", "bfloat16", (("queue", 0.5), ("decode", 12.25), ("encode", 3.0)))
RESULTS = {
    "jpeg": Result("image/jpeg", np.frombuffer(b"\xff\xd8..", np.uint8), provenance=PROVENANCE),
    "png": Result("image/png", np.frombuffer(b"\x89PNG..", np.uint8), provenance=PROVENANCE),
    "mp4": Result("video/mp4", np.frombuffer(b"....ftyp", np.uint8)),
    **{
        dtype: Result("tensor/binary", raw.data, raw.dtype, raw.shape, PROVENANCE)
        for dtype in ("float16", "float32", "bfloat16", "uint8")
        for raw in [from_array(latents(2, 3, 4).mul(9).abs().to(getattr(torch, dtype)))]
    },
}


def told(result: Result) -> tuple[Any, ...]:
    """Everything in a result, comparable."""
    return (result.media_type, result.data.tobytes(), result.dtype, result.shape, result.provenance)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_read_as_it_was_written_through_either_door(name: str) -> None:
    result = RESULTS[name]
    headers, body = result.to_http()
    assert told(Result.from_http(headers, bytes(body))) == told(result)
    headers, body = result.to_http("base64")
    assert told(Result.from_http(headers, bytes(body))) == told(result)
    assert told(Result.from_plain(result.to_plain())) == told(result)


def test_a_tensor_reply_is_as_the_hugging_face_clients_read_it() -> None:
    headers, body = RESULTS["float16"].to_http()
    assert (json.loads(headers["shape"]), headers["dtype"]) == ([2, 3, 4], "float16")
    assert headers["content-type"] == "tensor/binary"
    assert bytes(body) == RESULTS["float16"].data.tobytes()


def test_a_base64_reply_holds_shape_and_dtype_in_its_json() -> None:
    headers, body = RESULTS["bfloat16"].to_http("base64")
    assert headers["content-type"] == "tensor/base64"
    assert json.loads(bytes(body)) == {
        "inputs": base64.b64encode(RESULTS["bfloat16"].data.tobytes()).decode(),
        "parameters": {"shape": [2, 3, 4], "dtype": "bfloat16"},
    }


TENSOR = {"content-type": "tensor/binary", "shape": "[2]", "dtype": "float32"}
BASE64 = {"content-type": "tensor/base64"}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({"content-type": "text/html"}, b"<html>"),
        ({"content-type": "application/json"}, b'{"inputs": "AAAA"}'),
        (TENSOR, b"1234567"),
        (TENSOR | {"dtype": "float64"}, b"x" * 16),
        (TENSOR | {"shape": "2"}, b"x" * 8),
        (TENSOR | {"shape": "[2"}, b"x" * 8),
        (TENSOR | {"shape": "[Infinity]"}, b"x" * 8),
        (TENSOR | {"shape": "[-2]"}, b"x" * 8),
        (TENSOR | {"shape": '["a"]'}, b"x" * 8),
        ({"content-type": "tensor/binary"}, b"x" * 8),
        (BASE64, b"nothing"),
        (BASE64, b"[]"),
        (BASE64, b"[" * 100_000),
        (BASE64, b'{"inputs": "AAAA"}'),
        (BASE64, b'{"inputs": "?", "parameters": {"shape": [3], "dtype": "uint8"}}'),
        (BASE64, b'{"inputs": null, "parameters": {"shape": [3], "dtype": "uint8"}}'),
        (BASE64, b"\xff\xfe"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_200_that_is_not_of_this_protocol_is_a_broken_reply(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(BrokenReply):
        Result.from_http(headers, body)


def test_timings_that_cannot_be_read_are_left_out_and_break_nothing() -> None:
    headers = {"content-type": "image/png", "server-timing": 'cache;desc="hit", decode;dur=12.5, , x;dur=fast'}
    assert Result.from_http(headers, b"").provenance.timings == (("decode", 12.5),)


def test_a_file_is_no_tensor() -> None:
    with pytest.raises(BrokenReply, match="image/png"):
        _ = RESULTS["png"].tensor


@pytest.mark.parametrize("plain", [(), None, (PROTOCOL + 1, 1, 2), ("1",), [PROTOCOL], b"\x01"], ids=repr)
@pytest.mark.parametrize("read_plain", [DecodeRequest.from_plain, Result.from_plain])
def test_another_versions_tuple_is_refused_with_both_numbers(read_plain: Any, plain: Any) -> None:
    with pytest.raises(ProtocolMismatch, match=rf"speaks handle protocol {PROTOCOL}\b.*sent .*same version"):
        read_plain(plain)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("dtype", {"latents": RawTensor(np.zeros(1, np.uint8), "uint8", (1,))}),
        ("height", {"height": 0}),
        ("width", {"width": -8}),
        ("width", {"width": 2**30}),
        ("fps", {"fps": 0}),
        ("fps", {"fps": float("nan")}),
        ("input_tensor_type", {"body": "hex"}),
        ("output_tensor_type", {"reply": "hex"}),
    ],
    ids=str,
)
def test_a_request_checks_itself_before_any_byte_leaves(parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=parameter) as caught:
        DecodeRequest(**{"latents": from_array(LATENTS)} | arguments)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_factor_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(BadRequest, match="scaling_factor"):
        Scaling(factor=value)
    with pytest.raises(BadRequest, match="shift_factor"):
        Scaling(shift=value)


def test_a_factor_of_zero_is_refused_and_a_shift_of_zero_is_not() -> None:
    with pytest.raises(BadRequest, match="scaling_factor"):
        Scaling(factor=0)
    assert Scaling(shift=0).shift == 0
