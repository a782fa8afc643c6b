"""`MemoryPlanner`: the tiling plan and the batch size of each decode and encode that fit a model's memory budget."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.engine.memory.budget import GIB
from remote_vae_serve.engine.memory.estimate import MemoryEstimator, on_meta
from remote_vae_serve.engine.operation import Operation
from remote_vae_serve.engine.tiling import TilingPlan, plans
from remote_vae_serve.families.family import LatentSpace


class MemoryPlanner:
    """Plans for one model. Thread-safe.

    Args:
        model_class: of diffusers; its graph is run on torch's meta device.
        config: the model's, its class's defaults filled in.
        space: what it says of its latents.
        dtype: what decoded pixels are wanted in.
        loaded: the dtypes in which weights are on the device; it grows.
        budget: bytes that weights and work may take together.
        rewrites: the names of those that the engine runs the model with.
    """

    def __init__(
        self,
        model_class: Any,
        config: Mapping[str, Any],
        space: LatentSpace,
        dtype: torch.dtype,
        loaded: Collection[torch.dtype],
        budget: int,
        rewrites: tuple[str, ...] = (),
    ) -> None:
        self.budget = budget
        self._rewrites = rewrites
        self._model_class, self._config, self._space, self._dtype = model_class, config, space, dtype
        self._loaded = loaded
        self._estimators: dict[torch.dtype, MemoryEstimator] = {}
        self._lock = threading.Lock()

    def estimator(self, dtype: torch.dtype) -> MemoryEstimator:
        """What decodes and encodes take where they are computed in that dtype."""
        with self._lock:
            if dtype not in self._estimators:
                graph = on_meta(self._model_class, self._config, dtype)
                self._estimators[dtype] = MemoryEstimator(graph, self._space, self._dtype, self._rewrites)
            return self._estimators[dtype]

    @property
    def free(self) -> int:
        """Bytes of the budget that are left for decodes in the model's own dtype."""
        return self.free_for(self._dtype)

    def free_for(self, dtype: torch.dtype) -> int:
        """Bytes that are left for work in that dtype, whose weights may yet have to be loaded."""
        # A copy: the device's thread loads a model while others plan.
        return self.budget - sum(self.estimator(one).weights for one in {dtype, *tuple(self._loaded)})

    def plan(
        self, operation: Operation, shape: tuple[int, ...], dtype: torch.dtype, than: TilingPlan | None = None
    ) -> TilingPlan:
        """The plan that fits and takes the most memory.

        Args:
            shape: of the latents `[B, C, (T,) h, w]` or the pixels `[B, 3, (T,) H, W]`.
            dtype: what it is computed in.
            than: a plan that took too much; one that takes less is wanted.

        Raises:
            BadRequest: nothing fits, not in the smallest tiles either.
        """
        space, family = self._space, self._space.family
        height, width = (size * (space.ratio if operation.kind == "decode" else 1) for size in shape[-2:])
        # An encoder's batch is told apart in the last place: where it fits, it stays what diffusers makes of it.
        has_batches = operation.kind == "encode" or family.decodes_batches
        options = plans(height, width, family.tile is not None, shape[0], has_batches)
        estimator, free, needed = self.estimator(dtype), self.free_for(dtype), []
        for plan in options:
            if than is None or plan.takes_less_than(than):
                needed.append(estimator.of(operation, shape, plan))
                if needed[-1] <= free:
                    return plan
        least = "in the smallest tiles" if options[-1].tile else "one by one"
        less = f", and {in_gib(needed[-1])} {least}" if len(needed) > 1 else ""
        raise BadRequest(
            f"{operation.in_words} of shape {list(shape)} takes {in_gib(max(needed, default=0))} of memory{less}; this "
            f"replica has {in_gib(free)} for it. Send a smaller batch or picture",
            parameter="shape",
        )

    def batch_limit(self, operation: Operation, shape: tuple[int, ...], plan: TilingPlan, most: int) -> int:
        """Largest batch that latents of that shape fit in, together with others of it; at most `most`, if more came at once."""
        # What is done one by one gains nothing from a batch.
        family = self._space.family
        if not family.decodes_batches or family.draws or plan.one_by_one:
            return 1
        one = self.estimator(self._dtype).of(operation, (1, *shape[1:]), plan)
        return max(shape[0], min(most, self.free // max(one, 1)))


def in_gib(count: int) -> str:
    """Bytes, for people."""
    return f"{count / GIB:.2f} GiB"
