"""Kernels over channels_last rows, compiled by numba at their first use and kept in its cache: no compiler is needed.

Each takes bfloat16 or float32 and computes in float32; numba has no bfloat16, so that its bits are read and rounded here. They
run without the GIL, a share of the rows in each of as many threads as torch has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("ray.serve")

WORTH_IT = 2**18
"""Values of a tensor from which on a kernel is used: below, torch's own operations take no longer than the call of one."""


EPS = 1e-12
"""Least norm that `rms_norm` divides by: that of `functional.normalize`."""


def takes(activations: torch.Tensor) -> bool:
    """Whether there is a kernel for a tensor of that dtype, device and size."""
    return (
        activations.device.type == "cpu"
        and activations.dtype in (torch.bfloat16, torch.float32)
        and activations.numel() >= WORTH_IT
        and compiled() is not None
    )


@cache
def compiled() -> ModuleType | None:
    """The compiled kernels; None where numba is not installed or cannot be used (a new Python, no folder for its cache)."""
    try:
        from remote_vae_serve.engine.rewrites import compiled_kernels
    except Exception as error:  # whatever numba or LLVM raises on a machine that it does not know
        logger.warning("Norms and activations are not fused, for numba does not work here: %s", error)
        return None
    return compiled_kernels


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rewrites")


def group_norm_silu(
    rows: torch.Tensor, into: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    """SiLU of GroupNorm, in one pass after that for mean and variance.

    Args:
        rows: `[B, N, C]`, contiguous.
        into: of the same shape and dtype; may be `rows`.
        groups: into which the C channels are parted.
        weight, bias: `[C]`.
        eps: added to the variance.
    """
    scale, shift = _numbers(weight), _numbers(bias)
    for given, result in zip(_array(rows), _array(into), strict=True):
        _group_norm_silu(given, result, groups, scale, shift, eps)


def _group_norm_silu(given: Any, result: Any, groups: int, weight: Any, bias: Any, eps: float) -> None:
    kernels = compiled()
    assert kernels is not None
    count, channels = given.shape
    sums = np.zeros((torch.get_num_threads(), 2, channels))

    def add_up(number: int, first: int, last: int) -> None:
        kernels.moments(given, first, last, sums[number])

    def apply(number: int, first: int, last: int) -> None:
        kernels.affine_silu(given, result, first, last, factor, summand)

    _side_by_side(add_up, count)
    factor, summand = kernels.affine(given, sums, groups, weight, bias, eps)
    _side_by_side(apply, count)


def rms_norm(
    rows: torch.Tensor, into: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> None:
    """Each row divided by its Euclidean norm (at least 1e-12), times `weight`, plus `bias`, and SiLU of that if `silu`.

    Args:
        rows: `[B, N, C]`, contiguous.
        into: of the same shape and dtype; may be `rows`.
        weight, bias: `[C]`.
    """
    kernels = compiled()
    assert kernels is not None
    scale = _numbers(weight)
    shift = np.zeros_like(scale) if bias is None else _numbers(bias)
    given, result = (_array(one).reshape(-1, one.shape[-1]) for one in (rows, into))

    def apply(number: int, first: int, last: int) -> None:
        kernels.rms_norm(given, result, first, last, scale, shift, silu)

    _side_by_side(apply, len(given))


def _side_by_side(work: Callable[[int, int, int], None], count: int) -> None:
    """Work on so many rows in as many parts as torch has threads: called with the number of the part, its first row, and the one
    after its last."""
    parts = torch.get_num_threads()
    cuts = [count * number // parts for number in range(parts + 1)]
    others = [_threads().submit(work, number, *cuts[number : number + 2]) for number in range(1, parts)]
    work(0, *cuts[:2])
    for other in others:
        other.result()


def _numbers(parameter: torch.Tensor) -> Any:
    return parameter.detach().float().flatten().contiguous().numpy()


def _array(rows: torch.Tensor) -> Any:
    """The same memory as a numpy array: of bfloat16 its bits, as uint16."""
    return (rows.view(torch.uint16) if rows.dtype is torch.bfloat16 else rows).numpy()
