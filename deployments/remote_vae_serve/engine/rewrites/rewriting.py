"""`Rewriting`: graph rewrites of a model in force: each torch function that it calls goes to the rewrites that know it.

Not by tracing: half of diffusers' autoencoders branch on shapes, loop over frames and keep features in lists, and each has blocks
of its own. What they share is the order in which they call a dozen functions of torch, and that is rewritten as they are called:
one mechanism for all families, sizes and devices, the meta device of the memory forecast included, and no code of theirs copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from remote_vae_serve.engine.rewrites.deferred import METADATA, Deferred, Function, computed

if TYPE_CHECKING:
    from typing_extensions import Self

Handler = Callable[..., Any]
"""Called with a torch function's arguments; gives its result, or NotImplemented where the rewrite does not apply."""


class Rewrite:
    """One rewrite: what it changes in a loaded model, and the torch functions that it knows.

    The same is computed, in float32 to the rounding of the last place; `benchmarks/results/cpu.md` has what each one gains.
    """

    name = ""

    def prepare(self, model: torch.nn.Module) -> None:
        """Change the model once, when its weights are loaded."""

    def handlers(self) -> Mapping[Function, Handler]:
        """What it does with which function of torch."""
        return {}


class Rewriting(TorchFunctionMode):
    """A context in which the rewrites are in force, on the thread that enters it.

    Args:
        rewrites: the first that takes a function has it; none leaves the model eager.
    """

    def __init__(self, rewrites: Sequence[Rewrite]) -> None:
        super().__init__()
        self._rewrites = tuple(rewrites)
        self._handlers: dict[Function, list[Handler]] = {}
        self._pending: weakref.WeakValueDictionary[int, Deferred] = weakref.WeakValueDictionary()
        for rewrite in self._rewrites:
            for function, handler in rewrite.handlers().items():
                self._handlers.setdefault(function, []).append(handler)

    def prepare(self, model: torch.nn.Module) -> None:
        """Change a model whose weights are loaded."""
        for rewrite in self._rewrites:
            rewrite.prepare(model)

    def __enter__(self) -> Self:
        # One without rewrites is nothing to enter: a mode costs each call of torch some microseconds.
        return super().__enter__() if self._rewrites else self  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        self._pending.clear()
        if self._rewrites:
            super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for handler in self._handlers.get(func, ()):
            made = handler(*args, **kwargs)
            if made is not NotImplemented:
                if type(made) is Deferred and made.step is not None:
                    self._pending[id(made)] = made
                return made
        if func in METADATA:
            return func(*args, **kwargs)
        if _changes_a_tensor(func, kwargs):
            self._compute_what_waits()
        values, named = computed(args, kwargs)
        return func(*values, **named)

    def _compute_what_waits(self) -> None:
        """Before a tensor is changed in place: what waits may have it for an argument."""
        for waiting in list(self._pending.values()):
            waiting.value()
        self._pending.clear()


EAGER = Rewriting(())
"""Without any: the model runs as diffusers wrote it."""
IN_PLACE = frozenset({"__setitem__", "__set__"})
"""Functions that change a tensor, and whose name does not say it by a `_` at its end."""


def _changes_a_tensor(func: Function, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in IN_PLACE or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
