"""A local autoencoder in place of the server: `LocalTransport` does with diffusers here what a server does there, and
`WithFallback` asks the server first."""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from remote_vae.errors import (
    BadRequest,
    BrokenReply,
    ConnectionFailed,
    DeadlineExceeded,
    InternalError,
    RemoteVAEError,
    TimedOut,
    Unavailable,
)
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode, in_rgb
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.output import TENSOR, Output
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Provenance, Result
from remote_vae.protocol.tensors import RawTensor, from_array, to_numpy, to_torch
from remote_vae.transports.local_decoder import LocalDecoder
from remote_vae.transports.local_scaling import denormalize, normalize
from remote_vae.transports.retry import RetryState
from remote_vae.transports.transport import Transport

logger = logging.getLogger(__name__)
NOT_THE_USERS = (BrokenReply, ConnectionFailed, DeadlineExceeded, InternalError, TimedOut, Unavailable)
"""Errors that a local decode can make good. What is wrong with a request is wrong here too."""


class WithFallback(Transport):
    """Sends to a server, and decodes here what it could not.

    Args:
        server: asked first, with its own retries.
        local: asked where the server failed.
    """

    def __init__(self, server: Transport, local: LocalTransport) -> None:
        self.retry_policy = server.retry_policy
        self.peek = server.peek
        self._server = server
        self._local = local

    def try_one(self, request: Request) -> Result:
        return self.send_with_retries(RetryState(self.retry_policy), request)

    async def try_one_async(self, request: Request) -> Result:
        return await self.send_with_retries_async(RetryState(self.retry_policy), request)

    def send_with_retries(self, state: RetryState, request: Request) -> Result:
        try:
            return self._server.send_with_retries(state, request)
        except NOT_THE_USERS as error:
            return self._local.in_place_of(error, request)

    async def send_with_retries_async(self, state: RetryState, request: Request) -> Result:
        try:
            return await self._server.send_with_retries_async(state, request)
        except NOT_THE_USERS as error:
            return await asyncio.to_thread(self._local.in_place_of, error, request)

    def describe(self, wake: bool = False) -> ModelDescription:
        try:
            return self._server.describe(wake)
        except NOT_THE_USERS:
            return self._local.describe()

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        try:
            return await self._server.describe_async(wake)
        except NOT_THE_USERS:
            return self._local.describe()

    def send_ref(self, request: Request) -> Any:
        return self._server.send_ref(request)

    async def send_ref_async(self, request: Request) -> Any:
        return await self._server.send_ref_async(request)

    def in_place_of(self, error: RemoteVAEError, request: Request) -> Result:
        return self._local.in_place_of(error, request)

    def refuse_blocking(self) -> None:
        self._server.refuse_blocking()

    def close(self) -> None:
        self._server.close()


class LocalTransport:
    """Decodes and encodes with an autoencoder of diffusers, in this process.

    Args:
        vae: as a pipeline has it at `pipe.vae`. Latents are denormalized by its config; packed ones are Flux's, or LTX's.
    """

    def __init__(self, vae: Any) -> None:
        if not (hasattr(vae, "decode") and hasattr(vae, "config")):
            raise BadRequest(f"fallback is a {type(vae).__name__}; expected an autoencoder of diffusers",
                             parameter="fallback")  # fmt: skip
        self._vae = vae
        self._decoder = LocalDecoder(vae)

    def describe(self) -> ModelDescription:
        """What a pipeline asks of a server's description."""
        name = type(self._vae).__name__
        return ModelDescription(
            name="local fallback",
            state="ready",
            class_name=name,
            dtype=str(self._vae.dtype).removeprefix("torch."),
            encode="latents" if name == "AutoencoderTiny" else "moments",
            config={**self._vae.config, "_class_name": name},
        )

    def in_place_of(self, error: RemoteVAEError, request: Request) -> Result:
        """The result, made here; the error where that cannot be.

        Raises:
            BadRequest: what a server would have said of the request; or it has hints that cannot be kept here, which it names.
        """
        if isinstance(request, DecodeRequest) and request.output is Output.MP4:
            raise error  # there is no encoder of videos in the light client
        if lost := self._decoder.lost(request):
            raise BadRequest(f"The local fallback cannot keep {', '.join(lost)} with this {self._decoder.name} and would give "
                             f"something else; the server said: {error}", parameter=lost[0]) from error  # fmt: skip
        if self._decoder.is_strange(request):
            raise BadRequest(f"The local fallback does not know how pipelines scale or show what {self._decoder.name} makes; the "
                             f"server said: {error}", parameter="fallback") from error  # fmt: skip
        logger.warning("%s: decoding with the local fallback", error)
        import torch

        try:
            with torch.inference_mode():
                made = self._decode(request) if isinstance(request, DecodeRequest) else self._encode(request)
        except RemoteVAEError:
            raise
        except Exception as failed:  # a model that is not the server's, or has no memory left
            raise error from failed
        dtype = str(self._vae.dtype).removeprefix("torch.")
        provenance = Provenance("local fallback", "", dtype)
        if isinstance(made, bytes):
            assert isinstance(request, DecodeRequest)
            return Result(request.output.media_type, np.frombuffer(made, np.uint8), provenance=provenance)
        return Result(TENSOR, made.data, made.dtype, made.shape, provenance)

    def _decode(self, request: DecodeRequest) -> RawTensor | bytes:
        import torch

        latents = self._decoder.unpack(request)
        images_of_video = latents.ndim == 5 and not self._decoder.is_for_videos
        frames = latents.shape[2]
        if images_of_video:
            latents = latents.transpose(1, 2).flatten(0, 1)
        # As a server: in the wider of both dtypes, but HunyuanVideo's pipelines cast before they scale.
        wider = torch.promote_types(latents.dtype, self._vae.dtype)
        latents = latents.to(self._vae.dtype if self._decoder.is_for_videos else wider)
        ready = denormalize(latents, self._vae, request.scaling, request.hints).to(self._vae.device, self._vae.dtype)
        _refuse_infinity(ready, "latents")
        pixels = self._decoder.decode(ready, request.hints).cpu()
        if images_of_video:
            pixels = pixels.unflatten(0, (-1, frames)).transpose(1, 2)
        if request.output is Output.PT:
            return from_array(pixels)
        if (len(pixels) > 1 and (request.output.is_image or pixels.ndim == 5)) or (
            request.output.is_image and pixels.ndim == 5
        ):
            raise BadRequest(f"One {request.output.value} does not hold all that is in latents of shape "
                             f"{list(request.latents.shape)}; ask for pt", parameter="output_type")  # fmt: skip
        unit = ((pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels) * 0.5 + 0.5).clamp(0, 1)
        if request.output is Output.UNIT:
            return from_array(unit)
        uint8 = (unit.float() * 255).round().byte().permute(0, 2, 3, 1).contiguous()
        if request.output is Output.UINT8:
            return from_array(uint8)
        file = io.BytesIO()
        Image.fromarray(uint8[0].numpy()).save(file, request.output.media_type.removeprefix("image/"), quality=90)
        return file.getvalue()

    def _encode(self, request: EncodeRequest) -> RawTensor:
        import torch

        pixels = self._pixels(request)
        frames = pixels.shape[2] if pixels.ndim == 5 and not self._decoder.is_for_videos else None
        if frames is not None:
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        encoded = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype))
        if not hasattr(encoded, "latent_dist"):
            if request.sample_mode is SampleMode.MOMENTS:
                raise BadRequest("The fallback encodes to latents, not to a distribution; use argmax",
                                 parameter="sample_mode")  # fmt: skip
            latents = encoded.latents
        elif request.sample_mode is SampleMode.MOMENTS:
            latents = encoded.latent_dist.parameters
        elif request.sample_mode is SampleMode.ARGMAX:
            latents = encoded.latent_dist.mode()
        else:
            generator = None if request.seed is None else torch.Generator("cpu").manual_seed(request.seed)
            latents = encoded.latent_dist.sample(generator)
        if request.sample_mode is not SampleMode.MOMENTS:
            latents = normalize(latents, self._vae, request.scaling, request.hints)
        made = latents if frames is None else latents.unflatten(0, (-1, frames)).transpose(1, 2)
        if request.hints.layout == "channels_last":
            made = (made if made.ndim == 5 else made[:, :, None]).permute(0, 2, 3, 4, 1)
        return from_array(made)

    def _pixels(self, request: EncodeRequest) -> Any:
        from diffusers.image_processor import VaeImageProcessor

        image = request.image
        if isinstance(image, RawTensor) and image.dtype != "uint8":
            pixels = to_torch(image)
            pixels = pixels[None] if pixels.ndim == 3 else pixels
            if pixels.ndim == 4 and self._decoder.is_for_videos:
                pixels = pixels[:, :, None]
            if any(size % self._decoder.ratio for size in pixels.shape[-2:]):
                raise BadRequest(f"The pixels have shape {list(image.shape)}; the fallback takes multiples of "
                                 f"{self._decoder.ratio} along the edges", parameter="shape")  # fmt: skip
            _refuse_infinity(pixels, "pixels")
            return pixels
        if isinstance(image, RawTensor):
            array = to_numpy(image)
            pictures = [Image.fromarray(one) for one in (array if array.ndim == 4 else array[None])]
        else:
            try:
                pictures = [in_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(image.data))))]
            except Exception as error:  # on hostile bytes Pillow raises what it pleases
                raise BadRequest("The body is no picture that can be read", parameter="image") from error
        if min(pictures[0].size) < self._decoder.ratio:
            raise BadRequest(
                f"The picture is smaller than {self._decoder.ratio} pixels along an edge", parameter="image"
            )
        images = VaeImageProcessor(vae_scale_factor=self._decoder.ratio).preprocess(pictures)
        return images.transpose(0, 1)[None] if self._decoder.is_for_videos else images


def _refuse_infinity(tensor: Any, what: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise BadRequest(f"The {what} contain NaN or infinity, or get there when they are scaled", parameter="tensor")
