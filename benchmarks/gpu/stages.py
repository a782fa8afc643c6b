"""A decode from the latents' bytes to those of a JPEG, stage by stage, as a server passes through them."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, Times
from benchmarks.gpu.models import Model, Size

STAGES = ("to the device", "decode", "to uint8", "to the host", "JPEG")
QUALITY = 90


def stages(model: Model, dtype: str, size: Size, clock: Clock) -> dict[str, Any]:
    """Milliseconds of each stage, waited for one by one, and of all of them in one go. A video has no JPEG."""
    vae = model.build(dtype, clock.device)
    latents = model.latents(size, dtype)
    raw = bytearray(latents.view(torch.uint8).numpy().tobytes())
    kept: dict[str, Any] = {}
    pinned: dict[str, torch.Tensor] = {}

    def to_device() -> None:
        tensor = torch.frombuffer(raw, dtype=latents.dtype).view(latents.shape)
        kept["latents"] = tensor.pin_memory().to("cuda", non_blocking=True) if clock.device == "cuda" else tensor

    @torch.inference_mode()
    def decode() -> None:
        kept["pixels"] = vae.decode(kept["latents"], return_dict=False)[0]

    def quantise() -> None:
        kept["bytes"] = to_uint8(kept["pixels"])

    def to_host() -> None:
        if clock.device != "cuda":
            kept["host"] = kept["bytes"]
            return
        if "host" not in pinned:
            pinned["host"] = torch.empty(kept["bytes"].shape, dtype=torch.uint8, pin_memory=True)
        kept["host"] = pinned["host"].copy_(kept["bytes"], non_blocking=True)
        torch.cuda.synchronize()

    def encode() -> None:
        kept["jpeg"] = to_jpeg(kept["host"][0])

    steps: dict[str, Callable[[], None]] = dict(
        zip(STAGES, (to_device, decode, quantise, to_host, encode), strict=True)
    )
    if model.is_video:
        del steps["JPEG"]

    def everything() -> None:
        for step in steps.values():
            step()

    whole = times_on_the_host(everything, clock)
    each: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(whole.count):
        for name, step in steps.items():
            each[name].append(host_ms(step, clock))
    found: dict[str, Any] = {name: asdict(Times.of(ms)) for name, ms in each.items()}
    return {
        "stages_ms": found,
        "whole_ms": asdict(whole),
        "jpeg_by": jpeg_writer(),
        "jpeg_bytes": len(kept.get("jpeg", b"")),
    }


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, H, W, 3]`, frames of a video as N: as the server does it, to the range in the decoder's dtype, to bytes in float32."""
    frames = pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels
    unit = (frames * 0.5 + 0.5).clamp(0, 1)
    return (unit.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_jpeg(pixels: torch.Tensor) -> bytes:
    """By libjpeg-turbo where its binding is installed, as the server does it, else by Pillow."""
    if jpeg_writer() == "simplejpeg":
        import simplejpeg

        return bytes(simplejpeg.encode_jpeg(pixels.numpy(), QUALITY, "RGB", "420", fastdct=False))
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def jpeg_writer() -> str:
    return "simplejpeg" if find_spec("simplejpeg") else "Pillow"


def host_ms(function: Callable[[], object], clock: Clock) -> float:
    """By the host's clock: CUDA's events do not see what the host does."""
    clock.synchronize()
    began = time.perf_counter()
    function()
    clock.synchronize()
    return (time.perf_counter() - began) * 1e3


def times_on_the_host(function: Callable[[], object], clock: Clock) -> Times:
    clock.warm_up(function)
    first = host_ms(function, clock)
    more = max(clock.least, min(clock.most, int(clock.seconds * 1e3 / first)))
    return Times.of([first, *(host_ms(function, clock) for _ in range(more - 1))])
