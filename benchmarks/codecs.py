"""What writing a picture takes: the codecs that were looked at for JPEG and PNG, on one 1024x1024 picture, in turn.

    python benchmarks/codecs.py --out benchmarks/results/codecs.md

Those that are not installed (opencv-python-headless, imagecodecs, zlib-ng) are left out.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from remote_vae_serve.codecs.jpeg import JPEG_QUALITY, to_jpeg
from remote_vae_serve.codecs.png import to_png

PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"
SIZE, REPETITIONS, AT_ONCE = 1024, 9, 60


def picture() -> np.ndarray:
    """A photograph enlarged, with the grain that a decoder leaves."""
    with Image.open(PICTURE) as image:
        square = image.convert("RGB").crop((0, 0, image.height, image.height)).resize((SIZE, SIZE))
    grain = np.random.default_rng(0).normal(0, 2, (SIZE, SIZE, 3))
    return np.clip(np.asarray(square) + grain, 0, 255).astype(np.uint8)


def pillow(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def writers(pixels: np.ndarray) -> Iterator[tuple[str, Callable[[], bytes]]]:
    tensor = torch.from_numpy(pixels)
    yield "JPEG, simplejpeg (ours)", lambda: to_jpeg(tensor)
    yield "JPEG, Pillow", lambda: pillow(pixels, "JPEG", quality=JPEG_QUALITY)
    yield "PNG, Up filter and ISA-L (ours)", lambda: to_png(pixels)
    yield "PNG, Pillow, level 1", lambda: pillow(pixels, "PNG", compress_level=1)
    yield "PNG, Pillow, default", lambda: pillow(pixels, "PNG")
    try:
        import cv2

        cv2.setNumThreads(1)

        def opencv(suffix: str, *options: int) -> bytes:
            return bytes(cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1])

        yield "JPEG, OpenCV", lambda: opencv(".jpg", cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
        yield "PNG, OpenCV, level 1", lambda: opencv(".png", cv2.IMWRITE_PNG_COMPRESSION, 1)
    except ImportError:
        pass
    try:
        import imagecodecs

        yield "JPEG, imagecodecs", lambda: imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY)
        yield "PNG, imagecodecs (libspng), level 1", lambda: imagecodecs.spng_encode(pixels, level=1)
    except ImportError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pixels = picture()
    named = list(writers(pixels))
    times: dict[str, list[float]] = {name: [] for name, _ in named}
    for _ in range(REPETITIONS):
        for name, write in named:
            began = time.perf_counter()
            write()
            times[name].append((time.perf_counter() - began) * 1000)
    lines = ["| writer | median | least | kB | a second, 1 thread | 2 threads |", "|---|---:|---:|---:|---:|---:|"]
    for name, write in named:
        rates = [rate(write, threads) for threads in (1, 2)] if statistics.median(times[name]) < 50 else []
        cells = [f"{one:.0f}" for one in rates] or ["", ""]
        median, least = statistics.median(times[name]), min(times[name])
        lines.append(
            f"| {name} | {median:.1f} ms | {least:.1f} ms | {len(write()) / 1000:.0f} | {cells[0]} | {cells[1]} |"
        )
    print("\n".join(lines))
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        head = [
            "# Codecs", "", f"Commit {commit.strip()}, {platform.machine()}, Python {platform.python_version()}, Pillow "
            f"{PIL.__version__}. One {SIZE}x{SIZE} picture, JPEG quality {JPEG_QUALITY}; {REPETITIONS} turns each, all in turn. "
            "`python benchmarks/codecs.py` makes this page.", "",
        ]  # fmt: skip
        arguments.out.write_text("\n".join([*head, *lines, ""]))


def rate(write: Callable[[], bytes], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: write(), range(AT_ONCE)))
        return AT_ONCE / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
