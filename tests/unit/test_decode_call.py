"""What the user says and gets back; where the Hugging Face helper makes something of a reply, the same is made here."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import remote_utils
from diffusers.video_processor import VideoProcessor
from PIL import Image

from remote_vae import open_result
from remote_vae.calls.decode_call import DecodeCall, open_image
from remote_vae.errors import BadRequest, BrokenReply
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae.protocol.wire import Scaling
from samples import latents

Z = latents(1, 4, 2, 3)
PROCESSOR = VaeImageProcessor()


def picture(seed: int = 0, media_type: str = "image/png") -> Result:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, media_type.removeprefix("image/"))
    return Result(media_type, np.frombuffer(file.getvalue(), np.uint8))


def tensor_result(tensor: torch.Tensor) -> Result:
    raw = from_array(tensor)
    return Result("tensor/binary", raw.data, raw.dtype, raw.shape)


def as_response(result: Result) -> requests.Response:
    headers, body = result.to_http()
    response = requests.Response()
    response.status_code, response._content = 200, bytes(body)
    response.headers.update(headers)
    return response


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return isinstance(ours, list) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, Image.Image):
        return bool(np.array_equal(np.asarray(ours), np.asarray(theirs))) and ours.format == theirs.format
    return bool(ours == theirs)


PIXELS = latents(1, 3, 16, 24)
BYTES = PIXELS.mul(60).abs().to(torch.uint8)
VIDEO = latents(1, 3, 4, 16, 24)
CASES: dict[str, tuple[dict[str, Any], Result]] = {
    "a jpeg": ({}, picture(media_type="image/jpeg")),
    "a png": ({"image_format": "png"}, picture()),
    "pt": ({"output_type": "pt", "return_type": "pt"}, tensor_result(PIXELS)),
    "pt in half": ({"output_type": "pt", "return_type": "pt"}, tensor_result(PIXELS.half())),
    "pt and a processor": ({"output_type": "pt", "return_type": "pt", "processor": PROCESSOR}, tensor_result(PIXELS)),
    "images of pt": ({"output_type": "pt", "return_type": "pil", "processor": PROCESSOR}, tensor_result(PIXELS)),
    "images of bfloat16": (
        {"output_type": "pt", "return_type": "pil", "processor": PROCESSOR}, tensor_result(PIXELS.bfloat16()),
    ),
    "a video of pt": (
        {"output_type": "pt", "return_type": "pil", "processor": VideoProcessor()}, tensor_result(VIDEO),
    ),
    "uint8": (
        {"output_type": "pt", "return_type": "pt", "partial_postprocess": True}, tensor_result(BYTES.permute(0, 2, 3, 1)),
    ),
    "an image of uint8": (
        {"output_type": "pt", "return_type": "pil", "partial_postprocess": True}, tensor_result(BYTES.permute(0, 2, 3, 1)),
    ),
    "images of uint8": (
        {"output_type": "pt", "return_type": "pil", "partial_postprocess": True},
        tensor_result(torch.cat([BYTES, 255 - BYTES]).permute(0, 2, 3, 1)),
    ),
    "images of floats": ({"return_type": "pil", "processor": PROCESSOR}, tensor_result(PIXELS.abs().clamp(0, 1))),
    "images of bfloat16 floats": (
        {"return_type": "pil", "processor": PROCESSOR}, tensor_result(PIXELS.abs().clamp(0, 1).bfloat16()),
    ),
    "floats": ({"return_type": "pt", "processor": PROCESSOR}, tensor_result(PIXELS.abs().clamp(0, 1))),
    "mp4": ({"output_type": "mp4", "return_type": "mp4"}, Result("video/mp4", np.frombuffer(b"....ftyp", np.uint8))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_reply_becomes_what_the_hugging_face_helper_makes_of_it(case: str) -> None:
    arguments, result = CASES[case]
    names = ("processor", "output_type", "return_type", "partial_postprocess")
    theirs = remote_utils.postprocess_decode(
        as_response(result), **{name: arguments[name] for name in names if name in arguments}
    )
    assert same(DecodeCall(Z, **arguments).answer([result]), theirs)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, Image.Image),
        ({"processor": PROCESSOR}, list),
        ({"output_type": "pt"}, torch.Tensor),
        ({"output_type": "pt", "processor": PROCESSOR}, Image.Image),
        ({"output_type": "pt", "partial_postprocess": True}, Image.Image),
        ({"output_type": "mp4"}, bytes),
    ],
    ids=str,
)
def test_return_type_none_is_what_fits(arguments: dict[str, Any], kind: type) -> None:
    call = DecodeCall(Z, **arguments)
    results = {
        Output.JPEG: picture(media_type="image/jpeg"), Output.UNIT: tensor_result(PIXELS), Output.PT: tensor_result(PIXELS),
        Output.UINT8: tensor_result(BYTES.permute(0, 2, 3, 1)), Output.MP4: Result("video/mp4", np.zeros(4, np.uint8)),
    }  # fmt: skip
    assert isinstance(call.answer([results[call.output]]), kind)


@pytest.mark.parametrize(
    ("arguments", "scaling"),
    [
        ({}, Scaling(own=True)),
        ({"do_scaling": False}, Scaling()),
        ({"do_scaling": False, "scaling_factor": 2.0}, Scaling()),
        ({"scaling_factor": 2.0}, Scaling(factor=2.0)),
        ({"shift_factor": 0.0}, Scaling(shift=0.0)),
        ({"scaling_factor": 2.0, "shift_factor": 1.0}, Scaling(factor=2.0, shift=1.0)),
    ],
    ids=str,
)
def test_scaling_is_by_the_factors_given_else_the_models_own(arguments: dict[str, Any], scaling: Scaling) -> None:
    assert [request.scaling for request in DecodeCall(Z, **arguments).requests()] == [scaling]


BATCH = latents(3, 4, 2, 3)
PACKED = latents(3, 6, 16)
FRAMES = latents(2, 4, 3, 2, 2)


@pytest.mark.parametrize(
    ("z", "arguments", "shapes"),
    [
        (BATCH, {}, [(1, 4, 2, 3)] * 3),
        (BATCH, {"image_format": "png"}, [(1, 4, 2, 3)] * 3),
        (PACKED, {"height": 32, "width": 48}, [(1, 6, 16)] * 3),
        (BATCH[:1], {}, [(1, 4, 2, 3)]),
        (BATCH[0], {}, [(4, 2, 3)]),  # one image without a batch axis: the first axis is its channels
        (BATCH, {"output_type": "pt"}, [(3, 4, 2, 3)]),
        (BATCH, {"processor": PROCESSOR}, [(3, 4, 2, 3)]),
        (FRAMES, {"output_type": "pt"}, [(2, 4, 3, 2, 2)]),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_a_batch_is_one_request_per_image_only_where_a_reply_holds_one(
    z: torch.Tensor, arguments: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    sent = DecodeCall(z, **arguments).requests()
    assert [request.latents.shape for request in sent] == shapes
    assert torch.equal(torch.cat([to_torch(request.latents).reshape(-1) for request in sent]), z.reshape(-1))
    assert {(request.height, request.width) for request in sent} == {(arguments.get("height"), arguments.get("width"))}


def test_a_batch_of_images_comes_back_as_a_list_in_order() -> None:
    results = [picture(seed) for seed in range(3)]
    images = DecodeCall(BATCH, image_format="png").answer(results)
    assert [image.tobytes() for image in images] == [open_image(result).tobytes() for result in results]
    assert len({image.tobytes() for image in images}) == 3


def test_what_comes_back_is_in_kind() -> None:
    result = tensor_result(PIXELS)
    for output in ({"output_type": "pt"}, {"processor": PROCESSOR, "return_type": "pt"}):
        from_numpy = DecodeCall(Z.numpy(), **output).answer([result])
        assert isinstance(from_numpy, np.ndarray)
        np.testing.assert_array_equal(from_numpy, PIXELS.numpy())
        assert torch.equal(DecodeCall(Z, **output).answer([result]), PIXELS)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("output_type", {"output_type": "gif"}),
        ("return_type", {"return_type": "latent"}),
        ("image_format", {"image_format": "webp"}),
        ("return_type", {"return_type": "pt"}),
        ("return_type", {"return_type": "mp4"}),
        ("return_type", {"output_type": "mp4", "return_type": "pil"}),
        ("return_type", {"output_type": "pt", "return_type": "pil"}),
        ("scaling_factor", {"scaling_factor": 0.0}),
        ("shift_factor", {"shift_factor": float("nan")}),
        ("height", {"height": 0, "width": 8}),
        ("fps", {"output_type": "mp4", "fps": -1}),
        ("input_tensor_type", {"input_tensor_type": "hex"}),
        ("tensor", {"tensor": [[1.0]]}),
        ("tensor", {"tensor": torch.zeros(1, 4, 2, 2, dtype=torch.float64)}),
        ("dtype", {"tensor": torch.zeros(1, 4, 2, 2, dtype=torch.uint8)}),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_name_before_anything_is_sent(parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=parameter) as caught:
        DecodeCall(**{"tensor": Z} | arguments).requests()
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("body", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", picture().data.tobytes()[:200]], ids=len)
def test_a_picture_that_cannot_be_read_is_a_broken_reply(body: bytes) -> None:
    with pytest.raises(BrokenReply, match="image"):
        DecodeCall(Z).answer([Result("image/png", np.frombuffer(body, np.uint8))])


@pytest.mark.parametrize(
    "arguments", [{"output_type": "pt"}, {"processor": PROCESSOR}, {"output_type": "mp4"}], ids=str
)
def test_a_picture_where_something_else_was_asked_for_is_a_broken_reply(arguments: dict[str, Any]) -> None:
    with pytest.raises(BrokenReply, match="image/png"):
        DecodeCall(Z, **arguments).answer([picture()])


def test_a_handed_on_result_is_opened_by_what_it_is() -> None:
    png = picture()
    assert open_result(png.to_plain()).tobytes() == open_image(png).tobytes()
    assert open_result(Result("video/mp4", np.frombuffer(b"....ftyp", np.uint8)).to_plain()) == b"....ftyp"
    assert torch.equal(open_result(tensor_result(PIXELS).to_plain()), PIXELS)


def test_a_result_in_the_memory_of_another_process_is_answered_as_any_other() -> None:
    """What a Ray handle gives is read-only, and Pillow and torch both want to write."""
    result = tensor_result(BYTES.permute(0, 2, 3, 1))
    locked = result.data.copy()
    locked.flags.writeable = False
    call = DecodeCall(Z, output_type="pt", partial_postprocess=True)
    assert same(call.answer([replace(result, data=locked)]), call.answer([result]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", "64"),
        ("width", 1.5),
        ("fps", "24"),
        ("scaling_factor", "0.1"),
        ("shift_factor", []),
        ("do_scaling", "False"),
    ],
)
def test_an_argument_of_a_wrong_type_is_a_bad_request_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name) as caught:
        DecodeCall(Z, **{name: value})
    assert caught.value.parameter == name


def test_numbers_of_other_libraries_are_numbers() -> None:
    call = DecodeCall(Z, scaling_factor=torch.tensor(0.5), height=np.int64(8), width=np.int64(8))
    assert (call.scaling_factor, call.height) == (0.5, 8)
