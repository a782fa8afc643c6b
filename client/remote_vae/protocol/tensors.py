"""Tensors as they travel: raw little-endian bytes in C order, a dtype name and a shape.

Torch is never imported here on its own account: it is used when a torch tensor is handed in or asked for. bfloat16 has
no numpy dtype, hence the bytes (a flat uint8 array) and the name.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from remote_vae.errors import BadRequest

if TYPE_CHECKING:
    import torch

ITEM_SIZE = {"float16": 2, "float32": 4, "bfloat16": 2, "uint8": 1}
LATENT_DTYPES = ("float16", "float32", "bfloat16")
MAX_DIMENSIONS = 8
MAX_SIZE = 2**40


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as bytes.

    Attributes:
        data: the bytes, a flat uint8 array of `prod(shape) * itemsize`; possibly a read-only view.
        dtype: one of `ITEM_SIZE`.
        shape: sizes of the axes, each at least 1.

    Raises:
        BadRequest: an unknown dtype, an absurd shape, or bytes that do not fit both.
    """

    data: npt.NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZE:
            raise BadRequest(f"dtype is {self.dtype[:80]!r}; expected one of {', '.join(ITEM_SIZE)}", parameter="dtype")
        check_shape(self.shape)
        expected = math.prod(self.shape) * ITEM_SIZE[self.dtype]
        if self.data.nbytes != expected:
            raise BadRequest(
                f"The body has {self.data.nbytes} bytes; shape {list(self.shape)} of {self.dtype} needs {expected}",
                parameter="shape",
            )

    def samples(self) -> list[RawTensor]:
        """The tensors along the first axis, each with a first axis of 1; views, no copies."""
        size = self.data.nbytes // self.shape[0]
        shape = (1, *self.shape[1:])
        return [RawTensor(self.data[i * size : (i + 1) * size], self.dtype, shape) for i in range(self.shape[0])]


def announced(nbytes: int) -> npt.NDArray[np.uint8]:
    """Bytes that have not come yet: as many, in no memory. With them a request is read out of its query before its body comes."""
    return np.broadcast_to(np.uint8(0), (nbytes,))


def is_announced(data: npt.NDArray[np.uint8]) -> bool:
    """Whether that is what `announced` gave."""
    return data.strides == (0,)


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse shapes that no tensor has: BadRequest naming `shape`."""
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise BadRequest(f"shape has {len(shape)} axes; expected 1 to {MAX_DIMENSIONS}", parameter="shape")
    if not all(1 <= size <= MAX_SIZE for size in shape):
        written = ", ".join(str(size)[:12] for size in shape)
        raise BadRequest(
            f"shape is [{written}]; every axis must be at least 1, and of a size that fits in memory", parameter="shape"
        )


def is_torch(value: object) -> bool:
    """Whether `value` is a torch tensor, without importing torch to find out."""
    torch = sys.modules.get("torch")
    # While another thread imports torch, it has no Tensor yet.
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def host_bytes(value: Any) -> float:
    """Bytes of a torch tensor or a numpy array in this process's memory; infinite of anything else: a tensor on a GPU is there
    only when the GPU has made it."""
    if is_torch(value):
        return float(value.numel() * value.element_size()) if value.device.type == "cpu" else math.inf
    return value.nbytes if isinstance(value, np.ndarray) else math.inf


def from_array(value: Any) -> RawTensor:
    """A torch tensor (any device) or a numpy array as a RawTensor; no copy where the memory is contiguous on the host.

    Raises:
        BadRequest: not a tensor, or of a dtype that does not travel.
    """
    if is_torch(value):
        import torch

        name = str(value.dtype).removeprefix("torch.")
        if name in ITEM_SIZE:
            whole = value.detach().cpu().contiguous()
            # Each operation of torch lets go of the GIL, and may wait for it; none of numpy's views does.
            known = whole.view(torch.int16) if name == "bfloat16" else whole
            flat = known.numpy().reshape(-1).view(np.uint8)
            return RawTensor(flat, name, tuple(value.shape))
    elif isinstance(value, np.ndarray):
        name = value.dtype.name
        if name in ITEM_SIZE:
            flat_array = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            return RawTensor(flat_array, name, value.shape)
    else:
        raise BadRequest(f"Expected a torch tensor or a numpy array, not {type(value).__name__}", parameter="tensor")
    raise BadRequest(
        f"A tensor of {name} does not travel; cast it to one of {', '.join(LATENT_DTYPES)}", parameter="tensor"
    )


def cast(value: Any, dtype: str) -> Any:
    """A torch tensor or a numpy array in that dtype, to travel in fewer bytes.

    Raises:
        BadRequest: not a dtype of latents, one that numpy does not have, or a value beyond its range.
    """
    if dtype not in LATENT_DTYPES:
        raise BadRequest(f"wire_dtype is {dtype!r}; expected one of {', '.join(LATENT_DTYPES)}", parameter="wire_dtype")
    if is_torch(value):
        import torch

        narrow = value.to(getattr(torch, dtype))
        lost = bool((value.isfinite() & ~narrow.isfinite()).any())
    elif dtype == "bfloat16":
        raise BadRequest("numpy has no bfloat16; hand in a torch tensor, or use wire_dtype='float16'",
                         parameter="wire_dtype")  # fmt: skip
    else:
        with np.errstate(over="ignore"):
            narrow = value.astype(dtype)
        lost = bool((np.isfinite(value) & ~np.isfinite(narrow)).any())
    if lost:
        raise BadRequest(f"A value is beyond the range of wire_dtype={dtype!r}; use bfloat16, or leave wire_dtype out",
                         parameter="wire_dtype")  # fmt: skip
    return narrow


def to_numpy(raw: RawTensor) -> npt.NDArray[Any]:
    """The tensor as a numpy array, a view where possible; bfloat16 is widened to float32, which is exact."""
    if raw.dtype == "bfloat16":
        widened = raw.data.view("<u2").astype(np.uint32) << 16
        return widened.view(np.float32).reshape(raw.shape)
    return raw.data.view(np.dtype(raw.dtype).newbyteorder("<")).reshape(raw.shape)


def to_torch(raw: RawTensor) -> torch.Tensor:
    """The tensor as a torch tensor on the host, sharing memory where it is writable (plasma's is not: a copy there)."""
    return view_as_torch(raw if raw.data.flags.writeable else replace(raw, data=raw.data.copy()))


def view_as_torch(raw: RawTensor) -> torch.Tensor:
    """As `to_torch`, for who only reads it: of read-only memory too there is no copy. Never write to it."""
    import torch

    data = np.asarray(_Writable(raw.data)) if not raw.data.flags.writeable else raw.data
    # torch cannot view an odd address as a wider type; a slice of a reply's buffer may be one.
    if data.ctypes.data % ITEM_SIZE[raw.dtype]:
        data = data.copy()
    if raw.dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16).reshape(raw.shape)).view(torch.bfloat16)
    return torch.from_numpy(data.view(raw.dtype).reshape(raw.shape))


class _Writable:
    """An array that says of itself that it may be written to: torch has no read-only tensors, and warns of them."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data  # kept alive by whoever looks at it through this
        self.__array_interface__ = data.__array_interface__ | {"data": (data.ctypes.data, False)}
