"""What a request must give, as nouns that check an answer: pixels and latents are compared with diffusers' own."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from reading import psnr, read
from remote_vae.errors import RemoteVAEError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import RawTensor, to_torch
from remote_vae.protocol.wire import Scaling
from samples import pipeline_decode, tiny_vae

Factors = Literal["own", "none"] | tuple[float | None, float | None]
Form = Literal["jpg", "png", "unit", "pt", "uint8", "mp4"]
MEDIA = {"jpg": "image/jpeg", "png": "image/png", "mp4": "video/mp4"}
OUTPUTS = {"jpg": Output.JPEG, "png": Output.PNG, "unit": Output.UNIT, "pt": Output.PT, "uint8": Output.UINT8,
           "mp4": Output.MP4}  # fmt: skip
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


@lru_cache(maxsize=16)
def local_vae(kind: str, factors: Factors = "own") -> Any:
    """The model on this side; where factors are not its own, its config says those, so that diffusers' code applies them."""
    vae = tiny_vae(kind)
    if factors != "own":
        factor, shift = (None, None) if factors == "none" else factors
        vae.register_to_config(
            scaling_factor=1.0 if factor is None else factor, shift_factor=shift, latents_mean=None, latents_std=None
        )
    return vae


def decoded(kind: str, z: torch.Tensor, factors: Factors = "own", **sizes: int) -> torch.Tensor:
    """The decoder's output `[B, 3, H, W]` or `[B, 3, T, H, W]`, in float32 as the tiny models run."""
    vae = local_vae(kind, factors)
    if z.ndim == 3 and z.shape[0] == vae.config.latent_channels:
        z = z[None]
    return pipeline_decode(vae, z.float(), **(sizes if z.ndim == 3 else {}))


def frames_of(pixels: torch.Tensor) -> torch.Tensor:
    return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels


def as_uint8(pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    """`[N, H, W, 3]` by diffusers' own post-processing."""
    return np.stack([np.asarray(one) for one in VaeImageProcessor().postprocess(frames_of(pixels), output_type="pil")])


def assert_jpeg(picture: Any, exact: np.ndarray[Any, Any]) -> None:
    """As near to the exact pixels as a JPEG of them gets, and no scaling but the right one is."""
    buffer = io.BytesIO()
    Image.fromarray(exact).save(buffer, "JPEG", quality=75)
    lost = np.abs(np.asarray(Image.open(buffer), float) - exact).mean()
    assert np.abs(np.asarray(picture.convert("RGB"), float) - exact).mean() <= lost * 1.2 + 1


def tensor_of(answer: Any, as_base64: bool = False) -> torch.Tensor:
    """A tensor reply, read as the clients read it."""
    media = answer.headers["content-type"]
    if as_base64:
        assert media == "tensor/base64"
        content = answer.json()
        data, about = base64.b64decode(content["inputs"], validate=True), content["parameters"]
        assert set(content) == {"inputs", "parameters"}
        shape = about["shape"]
    else:
        assert media == "tensor/binary"
        data, about = answer.content, answer.headers
        shape = json.loads(about["shape"])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[about["dtype"]]).reshape(shape)


def assert_signed(answer: Any, model: str, *stages: str) -> None:
    """Which model answered, and how."""
    headers = answer.headers
    assert headers["x-vae-model"] == model
    assert headers["x-vae-dtype"] == "float32"
    assert "x-vae-revision" in headers
    assert re.fullmatch(", ".join(rf"{stage};dur=\d+\.\d+" for stage in stages), headers["server-timing"])


def scaling_of(factors: Factors) -> Scaling:
    if isinstance(factors, tuple):
        return Scaling(factor=factors[0], shift=factors[1])
    return Scaling(own=factors == "own")


@dataclass(frozen=True, eq=False)
class Decodes:
    """200 with what the model's pipeline makes of `z`, or diffusers with the given factors."""

    z: torch.Tensor
    form: Form
    factors: Factors = "own"
    sizes: dict[str, int] = field(default_factory=dict)
    as_base64: bool = False
    fps: float | None = None
    status: int = 200

    def check_parsed(self, request: Any) -> None:
        assert isinstance(request, DecodeRequest)
        assert torch.equal(to_torch(request.latents), self.z)
        assert str(self.z.dtype) == f"torch.{request.latents.dtype}"
        assert request.output is OUTPUTS[self.form]
        assert request.scaling == scaling_of(self.factors)
        assert {"height": request.height, "width": request.width} == {"height": None, "width": None} | self.sizes
        assert (request.reply == "base64", request.fps) == (self.as_base64, self.fps)

    def check(self, answer: Any, model: str) -> None:
        assert answer.status_code == 200, answer.text
        assert_signed(answer, model, "queue", "decode", "encode")
        pixels = decoded(model, self.z, self.factors, **self.sizes)
        if self.form in MEDIA:
            assert answer.headers["content-type"] == MEDIA[self.form]
            assert "shape" not in answer.headers
            self._check_file(answer.content, as_uint8(pixels))
            return
        expected = {
            "pt": lambda: pixels,
            "unit": lambda: VaeImageProcessor().postprocess(frames_of(pixels), output_type="pt"),
            "uint8": lambda: torch.from_numpy(as_uint8(pixels)),
        }[self.form]()
        got = tensor_of(answer, self.as_base64)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)

    def _check_file(self, content: bytes, exact: np.ndarray[Any, Any]) -> None:
        if self.form == "mp4":
            with tempfile.TemporaryDirectory() as folder:
                shown = read(content, Path(folder))
            assert (shown.codec, shown.frames.shape, shown.fps) == ("h264", exact.shape, self.fps or shown.fps)
            assert psnr(shown.frames, exact) > 15  # random weights make noise, which 4:2:0 cannot hold
            return
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.mode) == ({"jpg": "JPEG", "png": "PNG"}[self.form], "RGB")
        if self.form == "png":
            np.testing.assert_array_equal(np.asarray(picture), exact[0])
        else:
            assert_jpeg(picture, exact[0])


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """`[1, 3, H, W]` as image-to-image pipelines make them of a picture: channels last in memory, which moves the last bit of a
    convolution."""
    return VaeImageProcessor(vae_scale_factor=8).preprocess(picture.convert("RGB"))


def encoded(
    kind: str, pixels: torch.Tensor, factors: Factors = "none", mode: str = "argmax", seed: int | None = None
) -> torch.Tensor:
    """What diffusers' encoder gives, in the convention asked for."""
    config = local_vae(kind).config
    with torch.inference_mode():
        out = local_vae(kind).encode(pixels)
    if not hasattr(out, "latent_dist"):
        z = out.latents
    elif mode == "moments":
        return out.latent_dist.parameters
    elif mode == "argmax":
        z = out.latent_dist.mode()
    else:
        z = out.latent_dist.sample(torch.Generator("cpu").manual_seed(seed or 0))
    if factors == "own" and getattr(config, "latents_mean", None):  # StableDiffusionXLImg2ImgPipeline.prepare_latents
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (z - mean) * config.scaling_factor / std
    if factors == "own":
        factor, shift = config.scaling_factor, getattr(config, "shift_factor", None)
    else:
        factor, shift = (None, None) if factors == "none" else factors
    z = z if shift is None else z - shift
    return z if factor is None else z * factor


@dataclass(frozen=True, eq=False)
class Encodes:
    """200 with what the model's encoder makes of `pixels`, floats in [-1, 1]; without a seed any sample of its distribution."""

    pixels: torch.Tensor
    factors: Factors = "none"
    mode: str = "sample"
    seed: int | None = None
    as_base64: bool = False
    status: int = 200

    def check_parsed(self, request: Any) -> None:
        assert isinstance(request, EncodeRequest)
        assert request.scaling == scaling_of(self.factors)
        assert (request.sample_mode, request.seed) == (SampleMode(self.mode), self.seed)
        assert (request.reply == "base64") == self.as_base64
        if isinstance(request.image, RawTensor) and request.image.dtype != "uint8":
            assert torch.equal(to_torch(request.image).float().reshape(self.pixels.shape), self.pixels)

    def check(self, answer: Any, model: str) -> None:
        assert answer.status_code == 200, answer.text
        assert_signed(answer, model, "queue", "encode")
        z = tensor_of(answer, self.as_base64)
        assert z.dtype == torch.float32
        if self.mode != "sample" or self.seed is not None:
            assert torch.equal(z, encoded(model, self.pixels, self.factors, self.mode, self.seed))
            return
        mean = encoded(model, self.pixels, self.factors, "argmax")
        one = encoded(model, self.pixels, self.factors, "sample", 1)
        assert z.shape == mean.shape
        assert not torch.equal(z, mean)  # a sample, as image-to-image pipelines take
        assert (z - mean).std() < 2 * (one - mean).std()  # and one of this distribution, in this scale
        assert (z - mean).std() > 0.5 * (one - mean).std()


@dataclass(frozen=True, eq=False)
class Refused:
    """An error as JSON, with a sentence that holds `says` (a regular expression).

    Attributes:
        by: who finds it: the parser, which sees no model; the model; or the app around both.
        retry_after: whether the answer says when to try again.
    """

    status: int
    code: str
    parameter: str | None
    says: str
    by: Literal["parser", "model", "app"] = "parser"
    retry_after: bool = False

    def check_parsed(self, error: RemoteVAEError) -> None:
        assert (error.status, error.code, error.parameter) == (self.status, self.code, self.parameter)
        assert re.search(self.says, error.message)

    def check(self, answer: Any, model: str) -> None:
        assert answer.status_code == self.status, answer.text
        assert answer.headers["content-type"] == "application/json"
        fields = answer.json()
        assert set(fields) == {"error", "code", "request_id"} | ({"parameter"} if self.parameter else set())
        assert (fields["code"], fields.get("parameter")) == (self.code, self.parameter)
        assert re.search(self.says, fields["error"]), fields["error"]
        assert fields["request_id"]
        assert fields["request_id"] == answer.headers.get("x-request-id", fields["request_id"])
        assert ("retry-after" in answer.headers) == self.retry_after
        if self.by != "app":  # a model was found, and asked or about to be
            assert answer.headers["x-vae-model"] == model
        if self.retry_after:
            assert int(answer.headers["retry-after"]) >= 1


@dataclass(frozen=True, eq=False)
class Tells:
    """200 with a JSON object that has these keys."""

    keys: tuple[str, ...]
    status: int = 200

    def check(self, answer: Any, model: str) -> None:
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert set(self.keys) <= set(answer.json())


Gives = Decodes | Encodes | Refused | Tells
