"""`Meter` counts what a decode allocates and computes, operation by operation; on the meta device it does so without computing.

`with torch.inference_mode(), Meter(known=vae.parameters()) as meter: vae.decode(latents)`, then `meter.peak`, `meter.flops`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that live at one time, and floating-point operations.

    Storages are counted once, whatever views there are of them, from the operation that returns them to the moment nothing
    holds them. Scratch memory inside a kernel (cuDNN's workspaces) is not seen.

    Args:
        known: tensors that were there before, such as weights: neither they nor their views count.

    Attributes:
        peak: most bytes at one time.
        flops: by torch.utils.flop_counter's formulas, a multiplication and an addition being two.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = self.flops = 0
        self._bytes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and "upsample" not in func.name():
            # Without autograd, composite operations arrive whole; what they are made of is what allocates and computes. Not
            # so upsampling: in Python it is taken apart to a gather with a copy in float32, which no device does.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes or key in self._known:
            return
        self._bytes[key] = storage.nbytes()
        self.now += self._bytes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._bytes.pop(key, 0)


class FusedAttention(TorchFunctionMode):
    """Attention whose scores are never stored, as a GPU's kernels compute it: on the meta device the unfused form would be taken,
    whose scores are 512 MiB of a 1024x1024 decode in half precision. Its operations are counted here."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        self._meter.flops += sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class Prediction:
    """What a decode will take, from the meta device: `peak` bytes beside the weights, and `flops`.

    Args:
        vae: an autoencoder on the meta device.
        shape: of the latents.
    """

    def __init__(self, vae: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        latents = torch.empty(shape, dtype=dtype, device="meta")
        meter = Meter(known=(*vae.parameters(), *vae.buffers(), latents))
        with torch.inference_mode(), FusedAttention(meter), meter:
            vae.decode(latents, return_dict=False)
        self.peak, self.flops = meter.peak, meter.flops


class CardMemory:
    """`with CardMemory() as memory`: the most that torch allocated and reserved on the current CUDA device in the block.

    Attributes:
        peak: bytes allocated at one time beyond what was allocated at the start.
        reserved: bytes taken from the card altogether, the allocator's unused blocks among them.
    """

    peak = reserved = 0

    def __enter__(self) -> CardMemory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self._before
        self.reserved = torch.cuda.max_memory_reserved()
