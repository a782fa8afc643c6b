"""What the card's matrix units do at best, as this torch reaches it: the measure of every TFLOP/s in the tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.clock import Clock

RATES = ("float16", "bfloat16", "tf32", "float32")
"""`tf32` is float32 as cuDNN computes convolutions by default: rounded to 10 bits on the way into the matrix units."""


def matmul_rate(name: str, clock: Clock, edge: int) -> dict[str, Any]:
    """TFLOP/s of the product of two square matrices of random numbers (of zeros it would be a tenth more)."""
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    generator = torch.Generator(clock.device).manual_seed(0)
    left, right = (torch.randn(edge, edge, device=clock.device, generator=generator).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        times = clock.times(lambda: left @ right)
    finally:
        torch.set_float32_matmul_precision(precision)
    return {"edge": edge, "ms": asdict(times), "tflops": 2 * edge**3 / times.median / 1e9}


def rates(device: str) -> tuple[str, ...]:
    """Those that mean something there."""
    return RATES if device == "cuda" else tuple(rate for rate in RATES if rate != "tf32")


def rate_of(dtype: str, device: str) -> str:
    """The rate that a decode in that dtype is held against."""
    return "tf32" if dtype == "float32" and device == "cuda" and torch.backends.cudnn.allow_tf32 else dtype
