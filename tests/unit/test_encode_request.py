"""What is said of an encode, on either door and by the user: `EncodeRequest` and `EncodeCall`. Pure; no server, no model."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.calls.encode_call import EncodeCall
from remote_vae.errors import BadRequest, ProtocolMismatch, UnknownContentType
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode, in_rgb
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.request import read_request
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import RawTensor, from_array, to_numpy
from remote_vae.protocol.wire import Scaling

FLOATS = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)
BYTES = np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3), np.uint8)
FILE = b"\x89PNG\r\n\x1a\n and the rest of it"
PICTURE = np.frombuffer(FILE, np.uint8)

REQUESTS = {
    "picture": EncodeRequest(PICTURE),
    "floats": EncodeRequest(from_array(FLOATS)),
    "half": EncodeRequest(from_array(FLOATS.astype(np.float16)), Scaling(own=True)),
    "bfloat16": EncodeRequest(from_array(torch.from_numpy(FLOATS).bfloat16()), Scaling(False, 0.18215)),
    "one": EncodeRequest(from_array(FLOATS[0]), Scaling(False, None, -0.0609)),
    "video": EncodeRequest(from_array(np.zeros((1, 3, 5, 8, 8), np.float32)), Scaling(False, 0.1 + 0.2, 1e-9), seed=0),
    "uint8": EncodeRequest(from_array(BYTES), sample_mode=SampleMode.ARGMAX),
    "one uint8": EncodeRequest(from_array(BYTES[0]), seed=2**63 - 1),
    "moments": EncodeRequest(PICTURE, sample_mode=SampleMode.MOMENTS, deadline_s=12.5),
    "base64": EncodeRequest(from_array(BYTES), body="base64", reply="base64", seed=3, deadline_s=1),
    "hints": EncodeRequest(PICTURE, seed=5, hints=Hints(num_frames=9, sigma_data=0.5, denormalized=False)),
}
ALL = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)


def said(request: EncodeRequest) -> dict[str, Any]:
    """All of a request, comparable."""
    image = request.image
    pixels = (image.dtype, image.shape, image.data.tobytes()) if isinstance(image, RawTensor) else image.tobytes()
    return {**vars(request), "image": pixels}


@ALL
@pytest.mark.parametrize("verb", ["encode", None])
def test_what_was_written_over_http_is_read_again(request_: EncodeRequest, verb: Any) -> None:
    query, headers, body = request_.to_http()
    if verb is None and headers["content-type"].startswith("tensor/"):
        return  # a tensor on the URL of both is latents, until its sender says otherwise
    read = read_request(verb, query, headers, bytearray(body))
    assert isinstance(read, EncodeRequest)
    assert said(read) == said(request_)


@ALL
def test_what_crossed_a_handle_is_the_same(request_: EncodeRequest) -> None:
    plain = request_.to_plain()
    assert said(EncodeRequest.from_plain(plain)) == {**said(request_), "body": "binary", "reply": "binary"}


@ALL
def test_a_handle_carries_plain_values_only(request_: EncodeRequest) -> None:
    for value in request_.to_plain():
        flat = value if isinstance(value, tuple) else (*value, *value.values()) if isinstance(value, dict) else (value,)
        assert {type(one) for one in flat} <= {int, float, str, bool, type(None), np.ndarray}


def test_neither_door_copies_the_pixels() -> None:
    request = EncodeRequest(from_array(FLOATS))
    assert np.shares_memory(np.frombuffer(request.to_http()[2], np.uint8), FLOATS)
    assert np.shares_memory(request.to_plain()[1], FLOATS)
    read = EncodeRequest.from_http(*request.to_http())
    assert isinstance(read.image, RawTensor)
    assert np.shares_memory(read.image.data, FLOATS)


def test_a_handle_of_another_version_is_refused() -> None:
    with pytest.raises(ProtocolMismatch):
        EncodeRequest.from_plain((1, *EncodeRequest(PICTURE).to_plain()[1:]))


@pytest.mark.parametrize(
    "content_type", ["", "application/octet-stream", "image/png", "image/jpeg", "image/webp", "IMAGE/PNG; q=1"]
)
def test_a_picture_may_come_under_any_name_of_one_or_none(content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    read = EncodeRequest.from_http([], headers, FILE)
    assert said(read) == said(EncodeRequest(PICTURE))


def test_hugging_faces_client_is_understood() -> None:
    """No Content-Type, factors where they are given, floats as they print, repeated keys."""
    query = [("scaling_factor", "0.3611"), ("shift_factor", "0.1159"), *[("shape", str(n)) for n in FLOATS.shape],
             ("dtype", "float32")]  # fmt: skip
    read = EncodeRequest.from_http(query, {"accept": "*/*"}, FLOATS.tobytes())
    assert said(read) == said(EncodeRequest(from_array(FLOATS), Scaling(False, 0.3611, 0.1159)))


@pytest.mark.parametrize(
    ("query", "scaling"),
    [
        ([], Scaling()),
        ([("do_scaling", "false")], Scaling()),
        ([("do_scaling", "True")], Scaling(own=True)),
        ([("do_scaling", "True"), ("scaling_factor", "2")], Scaling(False, 2.0)),
        ([("do_scaling", "False"), ("scaling_factor", "2")], Scaling()),
        ([("scaling_factor", "2")], Scaling(False, 2.0)),
        ([("shift_factor", "0")], Scaling(False, None, 0.0)),
    ],
)
@pytest.mark.parametrize("content_type", ["image/png", ""])
def test_nothing_sent_is_nothing_applied(query: Any, scaling: Scaling, content_type: str) -> None:
    assert EncodeRequest.from_http(query, {"content-type": content_type}, FILE).scaling == scaling


SHAPE = [("shape", "1"), ("shape", "3"), ("shape", "2"), ("shape", "2")]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ([("sample_mode", "mean")], "sample_mode"),
        ([("sample_mode", "moments"), ("do_scaling", "1")], "sample_mode"),
        ([("sample_mode", "moments"), ("scaling_factor", "2")], "sample_mode"),
        ([("sample_mode", "moments"), ("shift_factor", "0")], "sample_mode"),
        ([("seed", "-1")], "seed"),
        ([("seed", str(2**63))], "seed"),
        ([("seed", "1.5")], "seed"),
        ([("seed", "1"), ("seed", "2")], "seed"),
        ([("scaling_factor", "0")], "scaling_factor"),
        ([("scaling_factor", "nan")], "scaling_factor"),
        ([("shift_factor", "inf")], "shift_factor"),
        ([("do_scaling", "maybe")], "do_scaling"),
        (SHAPE, "dtype"),
        ([*SHAPE, ("dtype", "float64")], "dtype"),
        ([*SHAPE, ("dtype", "float32")], "shape"),
        ([*SHAPE, ("dtype", "uint8")], "shape"),
        ([("shape", "2,2,3,1,1"), ("dtype", "uint8")], "shape"),
        ([("shape", "12"), ("dtype", "uint8")], "shape"),
        ([("shape", "2"), ("shape", "6"), ("dtype", "uint8")], "shape"),
        ([("shape", "2,3"), ("dtype", "float16")], "shape"),
        ([("shape", "1,1,1,1,2,3"), ("dtype", "float16")], "shape"),
        ([("shape", "0"), ("dtype", "uint8")], "shape"),
        ([("shape", "a"), ("dtype", "uint8")], "shape"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(query: Any, parameter: str) -> None:
    with pytest.raises(BadRequest) as caught:
        EncodeRequest.from_http(query, {}, b"123456789012")
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("content_type", ["tensor/binary", "tensor/base64"])
def test_a_tensor_needs_a_shape(content_type: str) -> None:
    body = FLOATS.tobytes()
    if content_type == "tensor/base64":
        body = json.dumps({"inputs": base64.b64encode(body).decode()}).encode()
    with pytest.raises(BadRequest, match="shape is missing") as caught:
        EncodeRequest.from_http([("dtype", "float32")], {"content-type": content_type}, body)
    assert caught.value.parameter == "shape"


@pytest.mark.parametrize("body", [b"", bytearray()])
def test_an_empty_body_is_no_picture(body: Any) -> None:
    with pytest.raises(BadRequest, match="empty") as caught:
        EncodeRequest.from_http([], {}, body)
    assert caught.value.parameter == "image"


def test_an_unknown_content_type_is_named() -> None:
    with pytest.raises(UnknownContentType, match="image/gif"):
        EncodeRequest.from_http([], {"content-type": "image/gif"}, b"GIF89a")


@pytest.mark.parametrize("header", ["0", "-1", "1.5", "", "soon", "9" * 12, "١"])
def test_a_deadline_that_is_none_is_refused(header: str) -> None:
    with pytest.raises(BadRequest) as caught:
        EncodeRequest.from_http([], {"x-vae-deadline-ms": header}, FILE)
    assert caught.value.parameter == "x-vae-deadline-ms"


@pytest.mark.parametrize(("seconds", "header"), [(1, "1000"), (0.0004, "1"), (2.9999, "2999"), (None, None)])
def test_a_deadline_is_written_in_milliseconds_and_never_longer(seconds: float | None, header: str | None) -> None:
    assert EncodeRequest(PICTURE, deadline_s=seconds).to_http()[1].get("x-vae-deadline-ms") == header


# What the user says


def only(image: Any, **options: Any) -> EncodeRequest:
    (request,) = EncodeCall(image, **options).requests()
    return request


def pixels(image: Any, **options: Any) -> Any:
    sent = only(image, **options).image
    assert isinstance(sent, RawTensor)
    return to_numpy(sent)


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(one) for one in BYTES[:count]]


def test_pil_images_and_uint8_are_sent_as_the_same_bytes() -> None:
    for image in (pictures(2), tuple(pictures(2)), BYTES, torch.from_numpy(BYTES)):
        assert np.array_equal(pixels(image), BYTES)
    assert np.array_equal(pixels(pictures(1)[0]), BYTES[:1])
    assert np.array_equal(pixels(BYTES[0]), BYTES[0])


def test_floats_are_sent_as_they_are() -> None:
    for image in (FLOATS, torch.from_numpy(FLOATS), torch.from_numpy(FLOATS).requires_grad_()):
        assert np.array_equal(pixels(image), FLOATS)
    assert np.array_equal(pixels(FLOATS.transpose(0, 1, 3, 2)), FLOATS.transpose(0, 1, 3, 2))
    assert np.array_equal(pixels(FLOATS.astype(">f4")), FLOATS)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_bytes_of_a_file_are_sent_as_they_are(kind: Any) -> None:
    sent = only(kind(FILE)).image
    assert not isinstance(sent, RawTensor)
    assert sent.tobytes() == FILE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_a_pil_image_of_any_mode_is_sent_as_rgb(mode: str) -> None:
    image = pictures(1)[0].convert("RGBA").convert("L").convert(mode) if mode == "PA" else pictures(1)[0].convert(mode)
    assert np.array_equal(pixels(image)[0], np.asarray(image.convert("RGB")))


def test_16_bits_of_grey_are_scaled_to_8_and_not_clipped() -> None:
    grey = np.arange(0, 2**16, 2**8, np.uint16).reshape(16, 16)
    assert np.array_equal(pixels(Image.fromarray(grey))[0, :, :, 0], np.arange(256).reshape(16, 16))


def test_colours_under_transparency_stay_and_nobody_is_warned() -> None:
    colours = Image.fromarray(BYTES[0]).quantize(8)
    file = io.BytesIO()
    colours.save(file, "PNG", transparency=bytes([0, 128] + [255] * 6))
    file.seek(0)
    transparent = Image.open(file)
    assert "transparency" in transparent.info
    assert np.array_equal(pixels(transparent)[0], np.asarray(colours.convert("RGB")))
    rgba = pictures(1)[0].copy()
    rgba.putalpha(0)
    assert np.array_equal(pixels(rgba)[0], BYTES[0])


def test_a_pil_image_is_taken_as_it_lies() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    pictures(1)[0].save(file, "PNG", exif=exif)
    assert np.array_equal(pixels(Image.open(file))[0], BYTES[0])


def test_the_callers_pictures_are_left_alone() -> None:
    image = pictures(1)[0].convert("P")
    only(image)
    in_rgb(image)
    assert image.mode == "P"


@pytest.mark.parametrize(
    ("image", "parameter"),
    [
        ([], "image"), (None, "image"), ("picture.png", "image"), ([FLOATS], "image"), ([*pictures(1), None], "image"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "image"), (b"", "image"),
        (np.zeros((3, 8, 8), np.uint8), "shape"), (np.zeros((1, 8, 8, 5), np.uint8), "shape"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), "shape"), (np.zeros((8, 8), np.float32), "shape"),
        (np.zeros((1, 3, 8, 8)), "tensor"), (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "tensor"),
        (np.zeros((0, 3, 8, 8), np.float32), "shape"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)  # fmt: skip
def test_what_is_no_image_is_refused_before_it_is_sent(image: Any, parameter: str) -> None:
    with pytest.raises(BadRequest) as caught:
        only(image)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"sample_mode": "mode"}, "sample_mode"), ({"sample_mode": None}, "sample_mode"),
        ({"sample_mode": "moments", "do_scaling": True}, "sample_mode"),
        ({"sample_mode": "moments", "shift_factor": 1}, "sample_mode"),
        ({"seed": "1"}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"), ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"), ({"scaling_factor": "2"}, "scaling_factor"), ({"scaling_factor": 0}, "scaling_factor"),
        ({"shift_factor": float("nan")}, "shift_factor"), ({"do_scaling": "False"}, "do_scaling"),
        ({"do_scaling": 1}, "do_scaling"), ({"wire_dtype": "int8"}, "wire_dtype"), ({"wire_dtype": "bfloat16"}, "wire_dtype"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(BadRequest) as caught:
        only(FLOATS, **options)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, Scaling()),
        ({"do_scaling": True}, Scaling(own=True)),
        ({"do_scaling": None}, Scaling()),
        ({"scaling_factor": 2}, Scaling(False, 2.0)),
        ({"shift_factor": 0}, Scaling(False, None, 0.0)),
        ({"scaling_factor": np.float32(0.5), "shift_factor": 1, "do_scaling": True}, Scaling(False, 0.5, 1.0)),
    ],
)
def test_scaling_is_what_was_asked_for_and_no_more(options: dict[str, Any], scaling: Scaling) -> None:
    assert only(FLOATS, **options).scaling == scaling


def test_seed_and_mode_are_passed_on() -> None:
    sent = only(FLOATS, seed=np.int64(5), sample_mode="argmax")
    assert (sent.seed, sent.sample_mode) == (5, SampleMode.ARGMAX)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float_pixels_travel_in_wire_dtype_and_pictures_as_they_are(dtype: str) -> None:
    assert np.array_equal(pixels(FLOATS, wire_dtype=dtype), FLOATS.astype(dtype))
    assert pixels(FLOATS.astype(float), wire_dtype=dtype).dtype == dtype
    for image in (BYTES, pictures(2)):
        assert np.array_equal(pixels(image, wire_dtype=dtype), BYTES)


def test_latents_come_back_in_kind() -> None:
    raw = from_array(FLOATS)
    result = Result("tensor/binary", raw.data, raw.dtype, raw.shape)
    for image, kind in ((FLOATS, np.ndarray), (torch.from_numpy(FLOATS), torch.Tensor), (pictures(1), torch.Tensor)):
        answer = EncodeCall(image).answer([result])
        assert isinstance(answer, kind)
        assert np.array_equal(answer, FLOATS)


def test_who_has_no_torch_gets_numpy() -> None:
    code = """
import sys
import numpy as np
from PIL import Image
from remote_vae.calls.encode_call import EncodeCall
from remote_vae.protocol.result import Result
call = EncodeCall(Image.new("RGB", (8, 8)))
call.requests()
print(type(call.answer([Result("tensor/binary", np.zeros(4, np.uint8), "bfloat16", (2,))])), "torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.split() == ["<class", "'numpy.ndarray'>", "False"]
