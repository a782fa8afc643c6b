"""Plain values read out of the tuples that cross a Ray handle, each checked where it is read: whoever holds a handle may send
anything, and what is wrong is said by its name. Of a value that is no word only the type is shown: it may be latents."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from remote_vae.errors import BadRequest
from remote_vae.protocol.tensors import is_announced

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


def fields(plain: Any, count: int, name: str) -> Sequence[Any]:
    """The values of a tuple of that length. Raises BadRequest."""
    if not isinstance(plain, (tuple, list)) or len(plain) != count:
        raise _refused(name, plain, f"a tuple of {count} values")
    return plain


def array(value: Any, name: str) -> npt.NDArray[np.uint8]:
    """Bytes, as a flat array of uint8. Raises BadRequest."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1 and _is_dense(value):
        return value
    raise _refused(name, value, "a flat array of uint8")


def sizes(value: Any, name: str) -> tuple[int, ...]:
    """Sizes of axes. Raises BadRequest."""
    if isinstance(value, (tuple, list)):
        whole_numbers = [as_integer(size) for size in value]
        if None not in whole_numbers:
            return tuple(size for size in whole_numbers if size is not None)
    raise _refused(name, value, "a tuple of whole numbers")


def text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    raise _refused(name, value, "a string")


def boolean(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise _refused(name, value, "True or False")


def integer(value: Any, name: str) -> int:
    if (whole := as_integer(value)) is not None:
        return whole
    raise _refused(name, value, "a whole number")


def number(value: Any, name: str) -> float:
    if (read := as_number(value)) is not None:
        return read
    raise _refused(name, value, "a finite number")


def member(kind: type[E]) -> Callable[[Any, str], E]:
    """Reads one of an enumeration's values."""

    def read(value: Any, name: str) -> E:
        for one in kind:
            if isinstance(value, str) and value == one.value:
                return one
        raise _refused(name, value, f"one of {', '.join(str(one.value) for one in kind)}")

    return read


def optional(read: Callable[[Any, str], T], value: Any, name: str) -> T | None:
    """The value where there is one."""
    return None if value is None else read(value, name)


def as_integer(value: Any) -> int | None:
    """None where it is no whole number; a string and a boolean are none, however they read."""
    if isinstance(value, (str, bytes, bool, np.ndarray)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """None where it is no finite number; a string, a boolean and an array are none, however they read."""
    if isinstance(value, (str, bytes, bool, np.ndarray)):
        return None
    try:
        read = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def _is_dense(value: npt.NDArray[np.uint8]) -> bool:
    return value.flags.c_contiguous or is_announced(value)


def _refused(name: str, value: Any, expected: str) -> BadRequest:
    given = repr(value[:80]) if isinstance(value, str) else f"of type {type(value).__name__}"
    return BadRequest(f"{name} is {given}; expected {expected}", parameter=name)
