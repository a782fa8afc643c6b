"""Videos made for tests, and videos read back."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch


def frames(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth moving colours, uint8 `[T, H, W, 3]`."""
    t, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 29 + t / 9), torch.sin(y / 27 - t / 11), torch.cos((x + y) / 41 + t / 12)]
    return ((torch.stack(waves, -1) * 0.45 + 0.5) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Shown:
    """What ffmpeg says of an mp4, and its frames."""

    codec: str
    pixel_format: str
    fps: float
    frames: np.ndarray[Any, Any]


def read(mp4: bytes, folder: Path) -> Shown:
    path = folder / "video.mp4"
    path.write_bytes(mp4)
    exactly = "scale=flags=accurate_rnd+full_chroma_int"  # swscale's default rounds down: a shift of one level
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-vf", exactly]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    run = subprocess.run(command, capture_output=True, check=True)
    (line,) = re.findall(r"Stream #0:0.*?: Video: (h264.*)", run.stderr.decode())[:1]
    width, height = map(int, re.findall(r", (\d+)x(\d+)", line)[0])
    return Shown(
        codec=line.split()[0],
        pixel_format=re.findall(r"yuv\w+", line)[0],
        fps=float(re.findall(r"([\d.]+) fps", line)[0]),
        frames=np.frombuffer(run.stdout, np.uint8).reshape(-1, height, width, 3),
    )


def psnr(ours: Any, theirs: Any) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(ours, float) - np.asarray(theirs, float)) ** 2)))
