"""`Engine`: a model on a device, latents to pixels and pixels to latents, within a budget of memory. Knows no Ray and no HTTP.

`Engine` is the seam: `load`, then `plan`, `decode` and `encode`. `diffusers_engine.DiffusersEngine` is the real one;
`fake.FakeEngine` stands in for it in tests of the service. What is done on the host before and after is its `processor`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from remote_vae.protocol.encode_request import SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae_serve.engine.abandonment import Abandonment
from remote_vae_serve.engine.memory.pending_results import PendingResults
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.processing.latent_processor import LatentProcessor

Event = Literal["tiled", "float32", "out_of_memory"]
"""What an operator counts: a decode or an encode in tiles, one that was repeated in float32, one that ran out of memory."""


@dataclass(frozen=True)
class Computed:
    """How a result was computed.

    Attributes:
        dtype: in which; the widest, where samples differ.
        plan: untiled or in tiles; the smallest, where samples differ.
    """

    dtype: torch.dtype
    plan: TilingPlan


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a decode gave, on the device.

    Attributes:
        pixels: `[B, 3, H, W]` or `[B, 3, T, H, W]`, in the engine's dtype.
        dtype, plan: how: see `Computed`.
    """

    pixels: torch.Tensor
    dtype: torch.dtype
    plan: TilingPlan = UNTILED

    @property
    def parts(self) -> tuple[torch.Tensor, Computed]:
        """Apart: who keeps the second keeps no tensor."""
        return self.pixels, Computed(self.dtype, self.plan)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encode gave, on the device.

    Attributes:
        latents: `[B, C, h, w]` or `[B, C, T, h, w]`, not normalized, or moments with twice the channels; in `dtype`.
        dtype, plan: how: see `Computed`.
    """

    latents: torch.Tensor
    dtype: torch.dtype
    plan: TilingPlan = UNTILED

    @property
    def parts(self) -> tuple[torch.Tensor, Computed]:
        """Apart: who keeps the second keeps no tensor."""
        return self.latents, Computed(self.dtype, self.plan)


class NotTogether(Exception):
    """Samples of several requests cannot be decoded as one batch; each request by itself may be, and says how it was."""


class Engine(ABC):
    """An autoencoder on one device. `decode` and `encode` are called from one thread at a time.

    Args:
        on_event: told of what an operator counts.

    Attributes:
        space: the model's latents.
        dtype, encode_dtype: what decoder and encoder run in.
        device: `cpu` or `cuda`.
        model_config: the model's config.json, its class's defaults filled in.
        buffers: statistics of the latents that lie in the model's buffers, by name.
        hints: what the application says of all its latents.
        is_probed: whether one small latent is decoded when it is loaded and now and then, to see that it still can.
        pending: results that are made and not yet gone; their memory counts.
        abandonment: asked between tiles and chunks whether anybody still waits.
    """

    space: LatentSpace
    dtype: torch.dtype
    encode_dtype: torch.dtype
    device: str
    model_config: Mapping[str, Any] = {}
    buffers: Mapping[str, tuple[float, ...]] = {}
    hints: Hints = Hints()
    is_probed: bool = True

    def __init__(self, on_event: Callable[[Event], object] = lambda event: None) -> None:
        self.on_event = on_event
        self.pending = PendingResults()
        self.abandonment = Abandonment()

    @abstractmethod
    def load(self) -> None:
        """Bring the weights to the device and warm up. Raises ModelFailed with the reason, for people."""

    @property
    def processor(self) -> LatentProcessor:
        """The host's half of the work on this model."""
        return LatentProcessor(self.space, self.dtype, self.encode_dtype, self.hints, self.encodes)

    def plan_decode(self, shape: tuple[int, ...], hints: RequestHints = NO_HINTS) -> TilingPlan:
        """How latents of that shape, `[B, C, (T,) h, w]`, are decoded within the memory there is.

        Raises:
            BadRequest: they do not fit, not in the smallest tiles either.
        """
        return UNTILED

    def plan_encode(self, shape: tuple[int, ...]) -> TilingPlan:
        """How pixels of that shape, `[B, 3, (T,) H, W]`, are encoded within the memory there is. Raises BadRequest as
        `plan_decode`."""
        return UNTILED

    def batch_limit(self, shape: tuple[int, ...], plan: TilingPlan, hints: RequestHints = NO_HINTS) -> int:
        """Largest batch that latents of that shape may be decoded in, together with others of it."""
        return 1

    @abstractmethod
    def decode(self, latents: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS) -> Decoded:
        """Decode denormalized latents `[B, C, (T,) h, w]` of `dtype`, which are on the host.

        Args:
            hints: what the request says of them.

        Raises:
            BadRequest: the pixels are not finite, whatever they are computed in.
            Unavailable: out of memory, in the smallest tiles too.
        """

    def decode_together(self, latents: torch.Tensor, plan: TilingPlan, hints: RequestHints = NO_HINTS) -> Decoded:
        """Decode samples of several requests as one batch: all as it was planned, or none.

        Raises:
            NotTogether: one of them made NaN or infinity, or memory ran out.
        """
        return self.decode(latents, plan, hints)

    @abstractmethod
    def encode(
        self,
        pixels: torch.Tensor,
        mode: SampleMode = SampleMode.SAMPLE,
        generator: torch.Generator | None = None,
        plan: TilingPlan = UNTILED,
    ) -> Encoded:
        """Encode pixels `[B, 3, (T,) H, W]` in [-1, 1], on the host, to latents or to the moments of their distribution.

        Args:
            mode: what is made of the distribution.
            generator: of the sample, on the CPU; None for chance.

        Raises:
            BadRequest: the latents are not finite, whatever they are computed in.
            Unavailable: out of memory, in the smallest tiles too.
        """

    def on_device(self) -> AbstractContextManager[object]:
        """Entered once by the thread that calls `decode` and `encode`."""
        return nullcontext()

    def on_idle(self) -> None:
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
