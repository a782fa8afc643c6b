"""`Deferred`: a tensor whose operation waits, so that the next one can be fused with it.

Its shape, dtype and device are known; its values are computed when something other than a rewrite asks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Function = Callable[..., Any]


class Step(ABC):
    """An operation that has not run yet, with its arguments."""

    @abstractmethod
    def compute(self) -> torch.Tensor:
        """Run it as it is, with nothing fused. The result is nobody else's."""


class Deferred(torch.Tensor):
    """A tensor that a step will make.

    Args:
        step: what makes it.
        size: of the result.
        like: a tensor of the result's dtype, on its device.
    """

    step: Step | None
    made: torch.Tensor | None

    @staticmethod
    def __new__(cls, step: Step, size: Sequence[int], like: torch.Tensor) -> Deferred:
        deferred: Deferred = torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=like.dtype, device=like.device)
        deferred.step, deferred.made = step, None
        return deferred

    def value(self) -> torch.Tensor:
        """Its values; computed once."""
        if self.made is None:
            assert self.step is not None
            with torch._C.DisableTorchFunction():  # or the rewrites in force would have it wait again
                self.made = self.step.compute()
            self.step = None
        return self.made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({type(self.step).__name__})"

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        values, named = computed(args, kwargs or {})
        return func(*values, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The same for what torch calls beneath its functions."""
        values, named = computed(args, kwargs or {})
        return func(*values, **named)


METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "layout")),
        *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")),
    }
)  # fmt: skip
"""What is known of a tensor without its values."""


def value_of(given: Any) -> Any:
    """A tensor's values, of a `Deferred` computed now; anything else as it is."""
    return given.value() if type(given) is Deferred else given


def computed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a torch function with the values of each `Deferred` among them, or in a list that is one."""
    return [_computed(one) for one in args], {name: _computed(one) for name, one in kwargs.items()}


def _computed(given: Any) -> Any:
    if type(given) is Deferred:
        return given.value()
    return [value_of(one) for one in given] if type(given) in (list, tuple) and Deferred in map(type, given) else given


def step_of(given: Any, kind: type[Any]) -> Any:
    """The step of that kind which a tensor waits for; None where it waits for none."""
    return given.step if type(given) is Deferred and isinstance(given.step, kind) else None
