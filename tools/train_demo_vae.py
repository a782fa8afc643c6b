"""Train the demo VAE that the server ships: a small, real `AutoencoderKL` (f8, 16 latent channels).

    python tools/train_demo_vae.py --steps 16000 --out deployments/remote_vae_serve/demo

Seeded. The pictures come out of scikit-image and scikit-learn (extra `[train]`), and from `procedural` below; the five of
`HELD_OUT` are never trained on, and the PSNR of each is printed and written into the model card.

What shapes it: crops of 64x64, 4 norm groups and no attention in the middle. Bigger crops or more groups per channel
stayed grey for thousands of steps.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter

HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "flower.jpg")
TRAINED_ON = (
    "astronaut.png", "brick.png", "cell.png", "clock_motion.png", "coins.png", "color.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png", "retina.jpg", "text.png", "china.jpg",
)  # fmt: skip
NATURAL = ("astronaut.png", "china.jpg")
CROP, BATCH, PEAK_RATE, KL_WEIGHT = 64, 4, 1e-3, 1e-6
HALF_PRECISION_SHARE = 0.8  # of the steps run under bfloat16 autocast; the rest settle the last decibel in float32
CARD = """\
---
license: apache-2.0
library_name: diffusers
---
# The demo VAE

A small `AutoencoderKL` (8x8 pixels a latent, 16 channels, {millions:.2f} million parameters) that comes with remote-vae, so
that the service can be tried without a GPU and without downloading weights. It is a demonstration, not a competitor: it
was trained for {minutes:.0f} minutes on two CPU cores by `tools/train_demo_vae.py --steps {steps}` (seed {seed}).

**Data.** scikit-image: {skimage} (public domain or CC0). scikit-learn: china.jpg, CC BY 2.0,
danielbuechele. Procedural pictures (coloured noise, gradients, shapes, lettering) by the script.

**Reconstruction** of pictures never trained on (PSNR of encode, then decode, 8-bit RGB; flower.jpg is CC BY 2.0, vultilion):

| picture | PSNR, dB |
|---|---|
{rows}
| **mean** | **{mean:.2f}** |

`scaling_factor` and `shift_factor` in `config.json` bring the latents of the training pictures to mean 0 and standard
deviation 1: `z_unit = (z - shift_factor) * scaling_factor`, as Stable Diffusion 3 and Flux have it.

`picture.png` is scikit-image's chelsea.png (CC0, Stefan van der Walt), cropped to a multiple of 16.
"""


def read(name: str) -> Image.Image:
    """A picture that scikit-image or scikit-learn carries, as RGB."""
    import skimage.data
    import sklearn.datasets

    folders = (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images")
    path = next(folder / name for folder in folders if (folder / name).exists())
    return Image.open(path).convert("RGB")


def coloured_noise(random: np.random.Generator, size: int) -> np.ndarray:
    """Noise whose spectrum falls as 1/f**a, as that of natural pictures does; the colours correlate."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    planes = []
    for _ in range(3):
        phase = random.standard_normal(frequency.shape) + 1j * random.standard_normal(frequency.shape)
        plane = np.fft.irfft2(phase / frequency ** random.uniform(0.8, 1.8), s=(size, size))
        planes.append((plane - plane.mean()) / (plane.std() + 1e-9))
    mix = np.eye(3) * random.uniform(0.1, 0.6) + random.uniform(-1, 1, (3, 1)) @ np.array([[1.0, 0.2, 0.1]])
    picture = np.tensordot(mix, np.stack(planes), 1) * random.uniform(20, 70) + random.uniform(60, 200, (3, 1, 1))
    return picture.transpose(1, 2, 0)


def procedural(random: np.random.Generator, size: int = 192) -> Image.Image:
    """A made-up picture: noise or a gradient behind shapes, lines and lettering, sometimes blurred."""

    def colour() -> tuple[int, ...]:
        return tuple(int(value) for value in random.integers(0, 256, 3))

    if random.random() < 0.6:
        ground = coloured_noise(random, size)
    else:
        corners = random.uniform(0, 255, (2, 2, 3)).astype(np.uint8)
        ground = np.asarray(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR), float)
        ground = ground + random.normal(0, random.uniform(0, 12), ground.shape)
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(random.integers(0, 14)):
        x, y = (int(value) for value in random.integers(-20, size, 2))
        w, h = (int(value) for value in random.integers(3, 90, 2))
        kind = random.integers(0, 4)
        if kind == 0:
            draw.ellipse((x, y, x + w, y + h), fill=colour())
        elif kind == 1:
            draw.rectangle((x, y, x + w, y + h), fill=colour(), outline=colour())
        elif kind == 2:
            draw.line((x, y, x + w, y + h), fill=colour(), width=int(random.integers(1, 6)))
        else:
            draw.text((x, y), "".join(chr(c) for c in random.integers(33, 126, 8)), fill=colour())
    if random.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 2.5)))
    return picture


def tinted(random: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The same crop in other colours: turned about the grey axis, brightness and contrast moved, mirrored."""
    angle = random.normal(0, 0.6)
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    pixels = (pixels - 127.5) @ turn.T * random.uniform(0.6, 1.2) + 127.5 + random.normal(0, 15)
    pixels = pixels[:, ::-1] if random.random() < 0.5 else pixels
    return pixels.transpose(1, 0, 2) if random.random() < 0.2 else pixels


def crops(random: np.random.Generator):  # type: ignore[no-untyped-def]
    """Endless batches `[BATCH, 3, CROP, CROP]` in [-1, 1]."""
    pyramid: list[tuple[float, np.ndarray]] = []
    for name in TRAINED_ON:
        whole = read(name)
        for scale in (1.0, 0.7, 0.45):
            size = (round(whole.width * scale), round(whole.height * scale))
            if min(size) > CROP:
                weight = 3.0 if name in NATURAL else 0.7
                pyramid.append((weight, np.asarray(whole.resize(size, Image.Resampling.LANCZOS), float)))
    made = [np.asarray(procedural(random), float) for _ in range(600)]
    weights = np.array([weight for weight, _ in pyramid])
    while True:
        batch = []
        for _ in range(BATCH):
            if random.random() < 0.3:
                source = made[random.integers(len(made))]
            else:
                source = pyramid[random.choice(len(pyramid), p=weights / weights.sum())][1]
            y, x = random.integers(source.shape[0] - CROP + 1), random.integers(source.shape[1] - CROP + 1)
            batch.append(tinted(random, source[y : y + CROP, x : x + CROP]).clip(0, 255) / 127.5 - 1)
        yield torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2)).float()


def cropped(picture: Image.Image, multiple: int = 16) -> Image.Image:
    return picture.crop((0, 0, picture.width // multiple * multiple, picture.height // multiple * multiple))


@torch.inference_mode()
def psnr(vae: AutoencoderKL, picture: Image.Image) -> float:
    """PSNR in dB of encode (mode), then decode, on 8-bit RGB."""
    pixels = np.asarray(cropped(picture))
    tensor = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()
    decoded = vae.decode(vae.encode(tensor).latent_dist.mode()).sample[0].permute(1, 2, 0)
    decoded = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().numpy()
    return float(10 * np.log10(255**2 / np.mean((decoded - pixels.astype(float)) ** 2)))


@torch.inference_mode()
def standardise(vae: AutoencoderKL, batches) -> None:  # type: ignore[no-untyped-def]
    """Set scaling_factor and shift_factor so that latents have mean 0 and standard deviation 1."""
    latents = torch.cat([vae.encode(next(batches)).latent_dist.mode() for _ in range(100)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report-every", type=int, default=250)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 96), layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False, sample_size=512, force_upcast=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    batches = crops(np.random.default_rng(args.seed))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, weight_decay=1e-4)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        batch = next(batches).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < HALF_PRECISION_SHARE * args.steps):
            posterior = vae.encode(batch).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - batch
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % args.report_every == 0:
            scores = [psnr(vae, read(name)) for name in HELD_OUT]
            shown = "  ".join(f"{name.split('.')[0]} {score:.2f}" for name, score in zip(HELD_OUT, scores))
            print(f"{step:6d}  {time.monotonic() - started:6.0f} s  loss {loss.item():.4f}  {shown}", flush=True)

    vae.eval().half().float()  # as stored: half the bytes; the scores below are those of the stored weights
    standardise(vae, batches)
    vae.half().save_pretrained(args.out)
    vae.float()
    cropped(read("chelsea.png")).save(args.out / "picture.png", optimize=True)
    scores = [psnr(vae, read(name)) for name in HELD_OUT]
    card = CARD.format(
        millions=sum(p.numel() for p in vae.parameters()) / 1e6,
        minutes=(time.monotonic() - started) / 60,
        steps=args.steps,
        seed=args.seed,
        skimage=", ".join(name for name in TRAINED_ON if name != "china.jpg"),
        rows="\n".join(f"| {name} | {score:.2f} |" for name, score in zip(HELD_OUT, scores)),
        mean=sum(scores) / len(scores),
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
