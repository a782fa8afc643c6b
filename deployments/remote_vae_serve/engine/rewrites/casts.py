"""Casts to float32 that a step would undo: models normalise and upsample in float32 and cast the result back.

The kernels here compute in float32 anyway, and a value that is only repeated is the same in any dtype: the copy need not be made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from remote_vae_serve.engine.rewrites.deferred import Deferred, Function, Step, step_of, value_of
from remote_vae_serve.engine.rewrites.rewriting import Handler, Rewrite


@dataclass(frozen=True, eq=False)
class Cast(Step):
    """A half-precision tensor cast to float32."""

    given: torch.Tensor

    def compute(self) -> torch.Tensor:
        return self.given.float()


class DeferredCasts(Rewrite):
    """Has a cast to float32 wait for what is done in it."""

    name = "deferred_casts"

    def handlers(self) -> Mapping[Function, Handler]:
        return {torch.Tensor.float: self._cast}

    @staticmethod
    def _cast(given: Any, **options: Any) -> Any:
        if options or given.dtype not in (torch.bfloat16, torch.float16):
            return NotImplemented
        given = value_of(given)
        return Deferred(Cast(given), given.shape, torch.empty((), dtype=torch.float32, device=given.device))


def before_cast(given: Any) -> tuple[torch.Tensor, torch.dtype]:
    """A tensor, of one whose cast to float32 waits that before it; and the dtype that the caller sees."""
    step = step_of(given, Cast)
    return (value_of(given), given.dtype) if step is None else (step.given, torch.float32)


def cast_to(given: torch.Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that `Tensor.to` or `Tensor.type_as` casts to with those arguments; None where they ask for more than that."""
    if options or len(args) != 1:
        return None
    if isinstance(args[0], torch.dtype):
        return args[0]
    return args[0].dtype if isinstance(args[0], torch.Tensor) and args[0].device == given.device else None
