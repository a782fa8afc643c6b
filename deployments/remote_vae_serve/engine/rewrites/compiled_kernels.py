"""The loops of `kernels`, as numba compiles them. Each works on rows `first` to `last` of an array `[N, C]`.

`numba.njit` needs plain loops: LLVM makes vectors of the inner one. `exp` is a polynomial, for a call of the C library would keep
the loop from that: its relative error is below 2e-7, that of float32.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

f4, i4, u2, u4 = np.float32, np.int32, np.uint16, np.uint32
FAST = {"contract", "reassoc", "nsz", "arcp"}
"""What may be done to the arithmetic: sums in another order; NaN and infinity stay what they are."""
BLOCK = 16
"""Rows that are summed in float32, before their sums are added up in float64."""


def load(bits):
    """A value of the array as float32; of uint16 the bfloat16 of those bits."""
    raise NotImplementedError


def store(value, like):
    """A float32 as a value of an array as `like` is of: as bfloat16 rounded to nearest, ties to even; NaN and infinity stay."""
    raise NotImplementedError


@overload(load)
def _load(bits):
    if bits == types.uint16:
        return lambda bits: u4(u4(bits) << u4(16)).view(np.float32)
    return lambda bits: bits


@overload(store)
def _store(value, like):
    if like == types.uint16:

        def rounded(value, like):
            bits = f4(value).view(np.uint32)
            return u2(u4(u4(bits + u4(0x7FFF)) + u4(u4(bits >> u4(16)) & u4(1))) >> u4(16))

        return rounded
    return lambda value, like: f4(value)


def compiled(loops):
    """Loops that numba compiles at their first call, without the GIL; kept where it finds a folder for that."""
    try:
        return njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")(loops)
    except RuntimeError:  # beside this file and in the home nothing can be written
        return njit(nogil=True, fastmath=FAST, error_model="numpy")(loops)


@njit
def silu(x):
    """x / (1 + exp(-x)), with exp(-x) = 2^n 2^f: n whole, f in [-0.5, 0.5] by a polynomial of degree 6."""
    t = min(max(-x * f4(1.4426950408889634), f4(-126.0)), f4(126.0))
    n = np.floor(t + f4(0.5))
    f = t - n
    p = f4(1.5403530e-4)
    p = p * f + f4(1.3333558e-3)
    p = p * f + f4(9.6181291e-3)
    p = p * f + f4(5.5504109e-2)
    p = p * f + f4(2.4022651e-1)
    p = p * f + f4(6.9314718e-1)
    p = p * f + f4(1.0)
    power = i4(i4(i4(n) + i4(127)) << i4(23)).view(np.float32)
    return x / (f4(1.0) + p * power)


@compiled
def moments(given, first, last, sums):
    """Adds to `sums` `[2, C]` the sum of each channel and of its squares, both less the channel's first value: of numbers far
    from zero the squares alone would have no digits left for the variance."""
    channels = given.shape[1]
    total, squares = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    pivot = np.empty(channels, np.float32)
    for c in range(channels):
        pivot[c] = load(given[0, c])
    for start in range(first, last, BLOCK):
        total[:] = 0
        squares[:] = 0
        for row in range(start, min(last, start + BLOCK)):
            for c in range(channels):
                value = load(given[row, c]) - pivot[c]
                total[c] += value
                squares[c] += value * value
        for c in range(channels):
            sums[0, c] += total[c]
            sums[1, c] += squares[c]


@compiled
def affine(given, sums, groups, weight, bias, eps):
    """What GroupNorm multiplies each channel by and what it adds, from the sums of `moments` in each part `[P, 2, C]`."""
    rows, channels = given.shape
    width = channels // groups
    factor, summand = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for group in range(groups):
        first, last = group * width, (group + 1) * width
        mean = 0.0
        for c in range(first, last):
            mean += load(given[0, c]) + sums[:, 0, c].sum() / rows
        mean /= width
        variance = 0.0
        for c in range(first, last):
            of_channel = sums[:, 0, c].sum() / rows
            away = load(given[0, c]) + of_channel - mean
            variance += sums[:, 1, c].sum() / rows - of_channel * of_channel + away * away
        scale = 1.0 / np.sqrt(variance / width + eps)
        for c in range(first, last):
            factor[c] = weight[c] * scale
            summand[c] = bias[c] - mean * scale * weight[c]
    return factor, summand


@compiled
def affine_silu(given, made, first, last, factor, summand):
    """SiLU of `factor` times a row plus `summand`."""
    channels = given.shape[1]
    for row in range(first, last):
        for c in range(channels):
            made[row, c] = store(silu(load(given[row, c]) * factor[c] + summand[c]), given[row, c])


@compiled
def rms_norm(given, made, first, last, weight, bias, activates):
    """A row by its Euclidean norm, times `weight`, plus `bias`; SiLU of that if it `activates`."""
    channels = given.shape[1]
    for row in range(first, last):
        total = f4(0)
        for c in range(channels):
            value = load(given[row, c])
            total += value * value
        scale = f4(1) / max(np.sqrt(total), f4(1e-12))
        if activates:
            for c in range(channels):
                made[row, c] = store(silu(load(given[row, c]) * (scale * weight[c]) + bias[c]), given[row, c])
        else:
            for c in range(channels):
                made[row, c] = store(load(given[row, c]) * (scale * weight[c]) + bias[c], given[row, c])
