"""`LatentProcessor`: preprocess and postprocess for one model, around its decoder and its encoder: the host's half of the work.

A decode is `unpack_latents` (host), the decoder, `postprocess_pixels` (device); an encode is `preprocess_image` (host), the
encoder, `pack_latents` (host). Knows no model, only its latent space; no engine, no Ray and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch

from remote_vae.errors import BadRequest
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import RawTensor, view_as_torch
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.latent_scaling import scale_and_shift, shift_and_scale
from remote_vae_serve.families.layouts import Layout, RequestHints, channels_last, drop_frames, unfold_frames
from remote_vae_serve.processing.finite import is_finite
from remote_vae_serve.processing.postprocess import check_output, to_output
from remote_vae_serve.processing.preprocess import Prepared, announced_shape, prepare


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Latents as the decoder takes them, and how to give its output the form that the client expects.

    Attributes:
        latents: `[B, C, h, w]` or `[B, C, T, h, w]`, denormalized, in the decoder's dtype, on the host.
        layout: the form in which they came.
        shape: in which they came.
        hints: what the request or the application says of them.
    """

    latents: torch.Tensor
    layout: Layout
    shape: tuple[int, ...]
    hints: RequestHints


@dataclass(frozen=True)
class LatentProcessor:
    """Preprocess and postprocess for one model.

    Attributes:
        space: the model's numbers and its family.
        dtype, encode_dtype: what decoder and encoder run in.
        hints: what the application says of all its latents; a request's own hints go before.
        encodes: what the encoder gives, moments of a distribution or latents; None where there is no encoder.
    """

    space: LatentSpace
    dtype: torch.dtype
    encode_dtype: torch.dtype
    hints: Hints = field(default_factory=Hints)
    encodes: Literal["moments", "latents"] | None = "moments"

    def unpack_latents(self, request: DecodeRequest) -> Unpacked:
        """Check a request against the model; bring its latents into the decoder's layout, scale and dtype.

        Arithmetic is done in the wider of the latents' dtype and the decoder's: where they are equal that is what every
        pipeline does, and SDXL's casts up before it scales. Families whose pipelines cast first do so here.

        Raises:
            BadRequest: naming the parameter.
        """
        space, family = self.space, self.space.family
        # A view: nothing here, and no decoder, writes to its input.
        latents, unpacked, layout, hints = self._unpack(request, view_as_torch)
        if request.scaling.own:
            scaled = family.scaling.denormalize(unpacked, space, hints)
        else:
            scaled = scale_and_shift(unpacked, request.scaling.factor, request.scaling.shift)
        ready = scaled.to(self.dtype)
        if not is_finite(ready):
            raise self._not_finite(latents)
        return Unpacked(ready, layout, tuple(latents.shape), hints)

    def announced_latents(self, request: DecodeRequest) -> tuple[tuple[int, ...], RequestHints]:
        """The shape of what the decoder would take, and what is said of it, where the latents have not come yet. Raises
        BadRequest as `unpack_latents` does, but not for what comes up when they are scaled."""
        _, unpacked, _, hints = self._unpack(request, _without_values)
        return tuple(unpacked.shape), hints

    def _unpack(
        self, request: DecodeRequest, read: Callable[[RawTensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Layout, RequestHints]:
        """The latents as they were sent and in the decoder's layout, not scaled yet; that layout, and what is said of them."""
        space, family = self.space, self.space.family
        hints = self._hints_of(request)
        latents = read(request.latents)
        layout = family.layout_of(latents, space, hints)
        wider = torch.promote_types(latents.dtype, self.dtype)
        unpacked = layout.unpack(latents, space, hints).to(self.dtype if family.cast_first else wider)
        unpacked = drop_frames(unpacked, hints)
        family.check(unpacked, space, hints)
        # Of pictures an unpacked batch may be larger than what came: layers are pictures of their own.
        batch = latents.shape[0] if layout.media == "video" else unpacked.shape[0]
        height, width = (size * space.ratio for size in unpacked.shape[-2:])
        check_output(request.output, batch, layout.media, height, width)
        return latents, unpacked, layout, hints

    def postprocess_pixels(self, pixels: torch.Tensor, unpacked: Unpacked, output: Output) -> torch.Tensor:
        """What leaves the device of decoded pixels: see `postprocess.to_output`. PT are the decoder's own numbers.

        Args:
            pixels: as the decoder made them of `unpacked`, on the device.
        """
        repack = unpacked.layout.repack
        repacked = pixels if repack is None else repack(pixels, unpacked.shape, unpacked.hints)
        to_signed = self.space.family.range.to_signed
        return to_output(repacked if to_signed is None or output is Output.PT else to_signed(repacked), output)

    def preprocess_image(self, request: EncodeRequest) -> Prepared:
        """The pixels of a request as the encoder takes them, in `encode_dtype`. Raises BadRequest naming the parameter."""
        self._check_encode(request)
        prepared = prepare(request, self.space)
        return replace(prepared, pixels=prepared.pixels.to(self.encode_dtype))

    def announced_pixels(self, request: EncodeRequest) -> tuple[int, ...]:
        """The shape of what the encoder would take, where the pixels have not come yet. Raises BadRequest for all that
        `preprocess_image` does, but what is in them."""
        self._check_encode(request)
        return announced_shape(cast(RawTensor, request.image), self.space)

    def _check_encode(self, request: EncodeRequest) -> None:
        if self.encodes is None:
            raise BadRequest(f"{self.space.class_name} has no encoder; it only decodes", parameter="model")
        if self.encodes == "latents" and request.sample_mode is SampleMode.MOMENTS:
            raise BadRequest(f"{self.space.class_name} encodes to latents, not to a distribution; use argmax",
                             parameter="sample_mode")  # fmt: skip

    def pack_latents(self, latents: torch.Tensor, prepared: Prepared, request: EncodeRequest) -> torch.Tensor:
        """What the encoder gave, in the scale that the request asks for.

        Returns:
            `[B, C, h, w]` or `[B, C, T, h, w]`; `[B, T, h, w, C]` where the hint `layout` says channels_last.
        """
        scaling = request.scaling
        hints = RequestHints.merged(request.hints.or_else(self.hints))
        if scaling.own:
            scaled = self.space.family.scaling.normalize(latents, self.space, hints)
        else:
            scaled = shift_and_scale(latents, scaling.factor, scaling.shift)
        if request.sample_mode is SampleMode.MOMENTS:
            return unfold_frames(scaled, prepared.frames)
        encoded = self.space.family.encoded
        made = unfold_frames(scaled if encoded is None else encoded(scaled), prepared.frames)
        return channels_last(made) if hints.layout == "channels_last" else made

    def _hints_of(self, request: DecodeRequest) -> RequestHints:
        """What the request or the application says of the latents. Raises BadRequest for what means nothing to this model."""
        takes = self.space.takes
        for name in request.hints.given():
            if name not in (*takes, "seed"):
                known = f"; it takes {', '.join(takes)}" if takes else ""
                raise BadRequest(f"{name} means nothing to {self.space.class_name}{known}", parameter=name)
        hints = request.hints.or_else(self.hints)
        if "seed" not in takes:  # of what draws nothing every seed makes the same, and all of them may run as one batch
            hints = replace(hints, seed=None)
        return RequestHints.merged(hints, request.height, request.width)

    def _not_finite(self, sent: torch.Tensor) -> BadRequest:
        """Why latents are not finite once they are scaled."""
        if is_finite(sent):
            name = str(self.dtype).removeprefix("torch.")
            return BadRequest(
                f"The latents leave the range of {name} when they are scaled; look at the factor",
                parameter="scaling_factor",
            )
        return BadRequest("The latents contain NaN or infinity; nothing can be decoded from them", parameter="tensor")


def _without_values(raw: RawTensor) -> torch.Tensor:
    """A tensor of that dtype and shape on torch's meta device."""
    return torch.empty(raw.shape, dtype=getattr(torch, raw.dtype), device="meta")
