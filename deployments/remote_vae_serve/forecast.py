"""`Forecast`: the memory that a decode or an encode will take, from the model's own graph.

The graph is run on torch's meta device, where tensors have shapes and no values: what is alive at each step is counted exactly,
for every family alike, tiling included, in some 40 ms for a Stable Diffusion decoder of any size.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from remote_vae_serve.tiling import Plan, view

MOST_TILES = 3
"""Along an edge, that are really run. A plan with more of them is extrapolated: what grows with their number, grows evenly."""


class Forecast:
    """What requests to one model will take on top of its weights. Thread-safe.

    Args:
        model: of the class and the dtype in question, on the meta device.
        tile: how to turn its tiling on.
        ratio: pixels along an edge for each latent.
    """

    def __init__(self, model: Any, tile: Callable[[Any, int, int], None] | None, ratio: int) -> None:
        self._model = model
        self._tile = tile
        self._ratio = ratio
        self._lock = threading.Lock()
        self._excess = 1.0
        self._dtype = next(model.parameters()).dtype
        self._decode = lru_cache(1024)(self._run_decode)
        self._encode = lru_cache(1024)(self._run_encode)

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return int(sum(parameter.nbytes for parameter in self._model.parameters()))

    def decode(self, shape: tuple[int, ...], plan: Plan) -> int:
        """Bytes at the peak of decoding latents of that shape, `[B, C, (T,) h, w]`."""
        with self._lock:
            return int(self._decode(shape, plan) * self._excess)

    def encode(self, shape: tuple[int, ...]) -> int:
        """Bytes at the peak of encoding pixels of that shape, `[B, 3, (T,) H, W]`."""
        with self._lock:
            return int(self._encode(shape) * self._excess)

    def learn(self, predicted: int, taken: int) -> None:
        """Remember that more was taken than predicted: workspaces of convolutions, what an allocator cannot use."""
        with self._lock:
            self._excess = max(self._excess, self._excess * taken / predicted)

    def _run_decode(self, shape: tuple[int, ...], plan: Plan) -> int:
        model = view(self._model, plan, self._tile, self._ratio)

        def peak(size: tuple[int, ...]) -> int:
            return peak_bytes(lambda: model.decode(torch.empty(size, dtype=self._dtype, device="meta")))

        if plan.tile is None:
            return peak(shape)
        most = MOST_TILES * plan.tile // self._ratio
        if max(shape[-2:]) <= most:
            return peak(shape)
        fewer, more = (tuple(min(size, edge) for size in shape[-2:]) for edge in (most * 2 // 3, most))
        area, area_of_fewer, area_of_more = (height * width for height, width in (shape[-2:], fewer, more))
        least, most_run = peak((*shape[:-2], *fewer)), peak((*shape[:-2], *more))
        grows = (most_run - least) / max(1, area_of_more - area_of_fewer)
        return int(most_run + max(0.0, grows) * (area - area_of_more))

    def _run_encode(self, shape: tuple[int, ...]) -> int:
        return peak_bytes(lambda: self._model.encode(torch.empty(shape, dtype=self._dtype, device="meta")))


def on_meta(model_class: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model without its weights: nothing but its graph."""
    with torch.device("meta"):
        model = model_class.from_config(dict(config))
    return model.to(dtype).eval().requires_grad_(False)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once while `run` ran; those it did not make do not count."""
    with torch.inference_mode(), _FusedAttention(), LiveBytes() as live:
        run()
    return int(live.peak)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, from their making to their end, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class _FusedAttention(TorchFunctionMode):
    """Attention as devices run it: without the matrix of scores, which the meta device would hold whole (1 GiB at 1024x1024)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
