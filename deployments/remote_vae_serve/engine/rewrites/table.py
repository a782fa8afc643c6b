"""The table of graph rewrites, and which an engine has."""

from __future__ import annotations

from collections.abc import Collection

from remote_vae_serve.engine.rewrites.casts import DeferredCasts
from remote_vae_serve.engine.rewrites.causal_padding import CausalPadding
from remote_vae_serve.engine.rewrites.channels_last import ChannelsLast
from remote_vae_serve.engine.rewrites.epilogue import Epilogue
from remote_vae_serve.engine.rewrites.group_norm_silu import GroupNormSiLU
from remote_vae_serve.engine.rewrites.noop_division import NoopDivision
from remote_vae_serve.engine.rewrites.rewriting import Rewrite, Rewriting
from remote_vae_serve.engine.rewrites.rms_norm_silu import RMSNormSiLU
from remote_vae_serve.engine.rewrites.upsampling import FoldedUpsampling

REWRITES: tuple[type[Rewrite], ...] = (
    ChannelsLast, NoopDivision, DeferredCasts, GroupNormSiLU, RMSNormSiLU, FoldedUpsampling, CausalPadding, Epilogue,
)  # fmt: skip
"""In order: of two that know a function, the first that applies has it."""
NAMES = tuple(rewrite.name for rewrite in REWRITES)


def rewrites_of(engine: str, device: str) -> tuple[str, ...]:
    """The names of those that an `engine` has: `fast` all of them, `eager` none; `auto` is fast on a processor. On a GPU it is
    eager: nobody has measured them there yet."""
    return NAMES if engine == "fast" or (engine == "auto" and device == "cpu") else ()


def rewriting(names: Collection[str] = ()) -> Rewriting:
    """A context with the rewrites of those names; without any the model is eager."""
    return Rewriting([rewrite() for rewrite in REWRITES if rewrite.name in names])
