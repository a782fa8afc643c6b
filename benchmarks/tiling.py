"""What tiling costs a picture: decodes in tiles of several sizes and overlaps against the whole decode of the same latents.

For each: the PSNR of all pixels, the worst seam (the largest mean difference along one row or column of pixels, in levels of 255:
what an eye would follow as a line), and the memory forecast. Runs on the CPU:

    python benchmarks/tiling.py --out benchmarks/results/tiling.md
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from PIL import Image

from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.tiling import TilingPlan, view
from remote_vae_serve.families import tile_rules
from remote_vae_serve.families.family import Tile
from remote_vae_serve.processing.postprocess import to_uint8

OVERLAPS = (0.125, 0.25, 0.5)
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
WIDTHS = (32, 64, 128, 128)  # a quarter of the real ones: the shape of the graph is what tiling sees
PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"


@dataclass(frozen=True)
class Case:
    """A model and latents of it, and the sizes of tiles to try."""

    name: str
    model: Any
    latents: torch.Tensor
    sizes: tuple[int, ...]
    tile: Tile


def cases() -> Iterator[Case]:
    """The demo VAE on a picture, random models on smooth random latents."""
    engine = DiffusersEngine(VAEConfig(source="demo", device="cpu", dtype="float32"), "cpu")
    engine.load()
    demo = engine._model(torch.float32)
    with torch.inference_mode():
        latents = demo.encode(picture(768)).latent_dist.mode()
    yield Case("demo VAE, a picture, 768 x 768", demo, latents, (512, 384, 256, 128), tile_rules.tile_squares)
    for name, channels in (("SD graph", 4), ("Flux graph", 16)):
        torch.manual_seed(0)
        model = AutoencoderKL(**KL, block_out_channels=WIDTHS, latent_channels=channels).eval()
        yield Case(
            f"{name}, random weights, 512 x 512",
            model,
            smooth(1, channels, 64, 64),
            (384, 256, 128),
            tile_rules.tile_squares,
        )
    torch.manual_seed(0)
    video = AutoencoderKLHunyuanVideo(block_out_channels=(16, 32, 64, 64), norm_num_groups=8).eval()
    yield Case(
        "HunyuanVideo graph, random weights, 5 frames of 512 x 384", video, smooth(1, 16, 2, 48, 64), (384, 256, 128),
        tile_rules.tile_by_strides,
    )  # fmt: skip


def picture(size: int) -> torch.Tensor:
    """A photograph, `[1, 3, size, size]` in [-1, 1]."""
    with Image.open(PICTURE) as image:
        square = image.convert("RGB").crop((0, 0, image.height, image.height)).resize((size, size))
    return torch.from_numpy(np.asarray(square).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def smooth(*shape: int) -> torch.Tensor:
    """Noise of several scales, as latents of a picture are, of variance 1."""
    made = torch.zeros(shape)
    for step in (1, 2, 4, 8):
        coarse = torch.randn(*shape[:-2], shape[-2] // step, shape[-1] // step)
        made += coarse.repeat_interleave(step, -1).repeat_interleave(step, -2)
    return made / made.std()


def measure(case: Case, size: int, overlap: float, whole: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and worst seam in levels, of a decode in tiles against the whole one."""
    tile_rules.OVERLAP = overlap
    model = view(case.model, TilingPlan(size), case.tile, 8)
    difference = pixels_of(model, case.latents) - whole
    error = float(np.square(difference).mean())
    lines = [float(np.abs(difference).mean(axis=axis).max()) for axis in ((0, 2, 3), (0, 1, 3))]
    return 10 * np.log10(255**2 / max(error, 1e-12)), max(lines)


def pixels_of(model: Any, latents: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return to_uint8(model.decode(latents, return_dict=False)[0]).numpy().astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = tile_rules.OVERLAP
    lines = []
    for case in cases():
        whole = pixels_of(case.model, case.latents)
        lines += [
            f"## {case.name}",
            "",
            "| tile | " + " | ".join(f"overlap {overlap:.3g}" for overlap in OVERLAPS) + " |",
        ]
        lines += ["|---:|" + "---:|" * len(OVERLAPS)]
        for size in case.sizes:
            cells = [measure(case, size, overlap, whole) for overlap in OVERLAPS]
            lines.append(f"| {size} | " + " | ".join(f"{psnr:.1f} dB, seam {seam:.1f}" for psnr, seam in cells) + " |")
            print(lines[-1], flush=True)
        lines.append("")
    tile_rules.OVERLAP = chosen
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        head = [
            "# Tiles against the whole", "",
            f"Commit {commit.strip()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, CPU, float32. "
            "PSNR of the uint8 pixels; the seam is the largest mean difference along one row or column, in levels of 255. "
            "`python benchmarks/tiling.py` makes this page.", "",
        ]  # fmt: skip
        arguments.out.write_text("\n".join(head + lines))


if __name__ == "__main__":
    main()
