"""The engine: weights on a device, latents to pixels and pixels to latents. Knows no Ray and no HTTP.

`Engine` is the seam. `eager.EagerEngine` is the real one; `fake.FakeEngine` stands in for it in tests of the service.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from remote_vae.decoding import DecodeRequest, Output
from remote_vae.encoding import EncodeRequest, SampleMode
from remote_vae.errors import BadRequest
from remote_vae.hints import Hints
from remote_vae.tensors import view_as_torch
from remote_vae_serve import codecs
from remote_vae_serve.conventions import scale_and_shift, shift_and_scale
from remote_vae_serve.families import LatentSpace
from remote_vae_serve.finite import is_finite
from remote_vae_serve.layouts import SAID_NOTHING, Layout, Said, channels_last
from remote_vae_serve.pictures import Prepared, prepare
from remote_vae_serve.tiling import WHOLE, Plan


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Latents as the decoder takes them, how it takes them, and how to give its output the form that the client expects."""

    latents: torch.Tensor
    layout: Layout
    shape: tuple[int, ...]
    said: Said
    plan: Plan
    group_limit: int


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a decode gave, on the device.

    Attributes:
        pixels: `[B, 3, H, W]` or `[B, 3, T, H, W]`, in the engine's dtype.
        dtype: what it was computed in; the widest, where samples differ.
        plan: whole or in tiles; the smallest, where samples differ.
    """

    pixels: torch.Tensor
    dtype: torch.dtype
    plan: Plan = WHOLE


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encode gave, on the device.

    Attributes:
        latents: `[B, C, h, w]` or `[B, C, T, h, w]`, not normalised, or moments with twice the channels; in `dtype`.
        dtype: what it was computed in.
        plan: whole or in tiles.
    """

    latents: torch.Tensor
    dtype: torch.dtype
    plan: Plan = WHOLE


class NotTogether(Exception):
    """Samples of several requests cannot be decoded as one batch; each request by itself may be, and says how it was."""


class Engine(ABC):
    """One model on one device.

    `load` first; then `unpack` (host), `decode` (device) and `codecs.write` (host) are the stages of a decode, `prepare`,
    `encode` and `pack` those of an encode. `decode` and `encode` are called from one thread at a time.

    Attributes:
        dtype, encode_dtype: what decoder and encoder run in.
        model_config: the model's config.json, its class's defaults filled in.
    """

    space: LatentSpace
    dtype: torch.dtype
    encode_dtype: torch.dtype
    device: str
    model_config: Mapping[str, Any] = {}
    hints: Hints = Hints()
    """What the application says of all its latents; a request's own hints go before."""
    happened: Callable[[str], None] = staticmethod(lambda event: None)
    """Told of what an operator counts: `tiled`, `float32`, `out_of_memory`."""
    make_room: Callable[[int], None] = staticmethod(lambda spare: None)
    """Called before work, with the bytes that it leaves of the budget; returns when what else is held fits in them. Raises
    Unavailable."""

    @abstractmethod
    def load(self) -> None:
        """Bring the weights to the device and warm up. Raises ModelFailed with the reason, for people."""

    def plan_decode(self, shape: tuple[int, ...], said: Said = SAID_NOTHING) -> Plan:
        """How latents of that shape, `[B, C, (T,) h, w]`, are decoded within the memory there is.

        Raises:
            BadRequest: they do not fit, not in the smallest tiles either.
        """
        return WHOLE

    def plan_encode(self, shape: tuple[int, ...]) -> Plan:
        """How pixels of that shape, `[B, 3, (T,) H, W]`, are encoded within the memory there is. Raises BadRequest as
        `plan_decode`."""
        return WHOLE

    def group_limit(self, shape: tuple[int, ...], plan: Plan, said: Said = SAID_NOTHING) -> int:
        """Largest batch that latents of that shape may be decoded in, together with others of it."""
        return 1

    @abstractmethod
    def decode(self, latents: torch.Tensor, plan: Plan = WHOLE, said: Said = SAID_NOTHING) -> Decoded:
        """Decode denormalised latents `[B, C, (T,) h, w]` of `dtype`, which are on the host.

        Args:
            said: what the request says of how.

        Raises:
            BadRequest: the pixels are not finite, whatever they are computed in.
            Unavailable: out of memory, in the smallest tiles too.
        """

    def decode_together(self, latents: torch.Tensor, plan: Plan, said: Said = SAID_NOTHING) -> Decoded:
        """Decode samples of several requests at once: all as it was planned, or none.

        Raises:
            NotTogether: one of them made NaN or infinity, or memory ran out.
        """
        return self.decode(latents, plan, said)

    @abstractmethod
    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode pixels `[B, 3, H, W]` in [-1, 1] to latents, not normalised, or to the moments of their distribution.

        Args:
            generator: of the sample, on the CPU; None for chance.
        """

    def encode_by(
        self, plan: Plan, pixels: torch.Tensor, mode: SampleMode, generator: torch.Generator | None = None
    ) -> Encoded:
        """`encode` by a plan, which the result tells with the dtype.

        Raises:
            BadRequest: the latents are not finite, whatever they are computed in.
            Unavailable: out of memory, in the smallest tiles too.
        """
        return Encoded(self.encode(pixels, mode, generator), self.encode_dtype)

    def leave(self, pixels: torch.Tensor, output: Output) -> torch.Tensor:
        """What leaves the device of decoded pixels for an output: see `codecs.leave`. PT are the decoder's own numbers."""
        to_signed = self.space.family.range.to_signed
        return codecs.leave(pixels if to_signed is None or output is Output.PT else to_signed(pixels), output)

    def on_device(self) -> AbstractContextManager[object]:
        """Entered once by the thread that calls `decode` and `encode`."""
        return nullcontext()

    def rest(self) -> None:
        """Called by that thread in a pause: what was kept for the next request may go."""
        return

    @property
    def revision(self) -> str:
        """What identifies the weights."""
        return ""

    @property
    def encodes(self) -> Literal["moments", "latents"] | None:
        """What the encoder gives: the moments of a distribution, or latents; None where there is no encoder."""
        return "moments" if self.space.family.has_distribution else "latents"

    def unpack(self, request: DecodeRequest) -> Unpacked:
        """Check a request against the model; bring its latents into the decoder's layout, scale and dtype.

        Arithmetic is done in the wider of the latents' dtype and the decoder's: where they are equal that is what every
        pipeline does, and SDXL's casts up before it scales. Families whose pipelines cast first do so here.

        Raises:
            BadRequest: naming the parameter.
        """
        latents = view_as_torch(request.latents)  # nothing here, and no decoder, writes to its input
        said = self._said(request)
        layout = self.space.family.layout_of(latents, self.space, said)
        wider = torch.promote_types(latents.dtype, self.dtype)
        unpacked = layout.unpack(latents, self.space, said).to(self.dtype if self.space.family.cast_first else wider)
        unpacked = _without_first(unpacked, said.hints.drop_frames)
        self.space.family.check(unpacked, self.space, said)
        # Of pictures an unpacked batch may be larger than what came: layers are pictures of their own.
        batch = latents.shape[0] if layout.media == "video" else unpacked.shape[0]
        codecs.check_output(request.output, batch, layout.media)
        height, width = (size * self.space.ratio for size in unpacked.shape[-2:])
        codecs.check_size(request.output, height, width)
        plan = self.plan_decode(tuple(unpacked.shape), said)
        scaling = request.scaling
        scaled = (
            self.space.denormalise(unpacked, said)
            if scaling.own
            else scale_and_shift(unpacked, scaling.factor, scaling.shift)
        )
        ready = scaled.to(self.dtype)
        if not is_finite(ready):
            if is_finite(latents):
                name = str(self.dtype).removeprefix("torch.")
                raise BadRequest(f"The latents leave the range of {name} when they are scaled; look at the factor",
                                 parameter="scaling_factor")  # fmt: skip
            raise BadRequest(
                "The latents contain NaN or infinity; nothing can be decoded from them", parameter="tensor"
            )
        limit = self.group_limit(tuple(ready.shape), plan, said)
        return Unpacked(ready, layout, tuple(latents.shape), said, plan, limit)

    def _said(self, request: DecodeRequest) -> Said:
        """What the request or the application says of the latents. Raises BadRequest for what means nothing to this model."""
        takes = self.space.takes
        for name in request.hints.said():
            if name not in (*takes, "seed"):  # of what draws nothing every seed makes the same
                known = f"; it takes {', '.join(takes)}" if takes else ""
                raise BadRequest(f"{name} means nothing to {self.space.class_name}{known}", parameter=name)
        return Said(request.height, request.width, request.hints.or_else(self.hints))

    def prepare(self, request: EncodeRequest) -> Prepared:
        """The pixels of a request as the encoder takes them, in `encode_dtype`. Raises BadRequest naming the parameter."""
        if self.encodes is None:
            raise BadRequest(f"{self.space.class_name} has no encoder; it only decodes", parameter="model")
        if self.encodes == "latents" and request.sample_mode is SampleMode.MOMENTS:
            raise BadRequest(f"{self.space.class_name} encodes to latents, not to a distribution; use argmax",
                             parameter="sample_mode")  # fmt: skip
        prepared = prepare(request, self.space)
        plan = self.plan_encode(tuple(prepared.pixels.shape))
        return replace(prepared, pixels=prepared.pixels.to(self.encode_dtype), plan=plan)

    def pack(self, latents: torch.Tensor, prepared: Prepared, request: EncodeRequest) -> torch.Tensor:
        """What the encoder gave, in the convention that the request asks for: `[B, C, h, w]` or `[B, C, T, h, w]`."""
        scaling = request.scaling
        said = Said(hints=request.hints.or_else(self.hints))
        scaled = (
            self.space.normalise(latents, said)
            if scaling.own
            else shift_and_scale(latents, scaling.factor, scaling.shift)
        )
        if request.sample_mode is SampleMode.MOMENTS:
            return prepared.unfold(scaled)
        encoded = self.space.family.encoded
        made = prepared.unfold(scaled if encoded is None else encoded(scaled))
        return channels_last(made) if said.hints.layout == "channels_last" else made


def _without_first(latents: torch.Tensor, count: int | None) -> torch.Tensor:
    """Without so many leading frames. Raises BadRequest where nothing would be left."""
    if not count or latents.ndim != 5:
        return latents
    if count >= latents.shape[2]:
        raise BadRequest(
            f"drop_frames is {count}, and the latents have {latents.shape[2]} frames", parameter="drop_frames"
        )
    return latents[:, :, count:]
