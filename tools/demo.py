"""The main job in a minute, with nothing but this machine: a picture to a latent, the latent to a server, a picture back.

Starts the server of serve_config.yaml on a free port, decodes with the bundled demo VAE over HTTP and through a Ray handle,
writes the pictures, and stops what it started.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from local_server import LocalServer, ServerFailed
from remote_vae import RemoteVAE
from remote_vae.ray_internals import DRAINING_VARIABLE, LOOPBACK_VARIABLES
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.weights import DEMO

START = time.monotonic()
STOPS_SOON = {DRAINING_VARIABLE: "0"}
"""Nobody else sends it requests."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step, then say how long it took."""
    print(f"  {name} ", end="", flush=True)
    started = time.monotonic()
    yield
    print(f" {time.monotonic() - started:.2f} s", flush=True)


def dots(every_s: float = 1.0) -> Iterator[None]:
    """Yields for ever, printing a dot about once a second."""
    last = time.monotonic()
    while True:
        if time.monotonic() - last >= every_s:
            print(".", end="", flush=True)
            last = time.monotonic()
        yield


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit RGB pictures of one size."""
    error = np.asarray(image, float) - np.asarray(reference, float)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def demo_vae() -> DiffusersEngine:
    """The bundled VAE in this process, for encoding: a generator would make its latents out of noise."""
    engine = DiffusersEngine(VAEConfig(source="demo", device="cpu"), "cpu")
    engine.load()
    return engine


def encode(engine: DiffusersEngine, pictures: list[Image.Image]) -> torch.Tensor:
    """Latents `[B, C, h, w]` of pictures of one size, scaled as a pipeline's latents are."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    return engine.space.family.scaling.normalize(engine.encode(pixels).latents, engine.space)


def clip(frames: int = 24, width: int = 192, height: int = 128) -> list[Image.Image]:
    """A ball that rolls by under a sky that turns."""
    pictures = []
    for frame in range(frames):
        turn = 2 * math.pi * frame / frames
        down = np.linspace(0, 1, height)[:, None] * np.ones((1, width))
        shades = [128 + 90 * np.sin(turn + 2 * down + phase) for phase in (0.0, 2.1, 4.2)]
        picture = Image.fromarray(np.stack(shades, -1).round().astype(np.uint8))
        x, y = round((width + 40) * frame / frames) - 20, round(height - 24 - 50 * abs(math.sin(2 * turn)))
        ImageDraw.Draw(picture).ellipse(
            (x - 20, y - 20, x + 20, y + 20), fill=(230, 90, 40), outline=(60, 20, 10), width=3
        )
        pictures.append(picture)
    return pictures


def through_a_handle(server: LocalServer, latent: torch.Tensor) -> Image.Image:
    """As a generator in the same cluster would: no HTTP."""
    os.environ.update(server.ray_environment | LOOPBACK_VARIABLES)
    import ray
    from ray import serve  # noqa: F401  it sets its logger up when it is imported

    logging.getLogger("ray.serve").setLevel("ERROR")
    ray.init(address=server.ray_address, log_to_driver=False, logging_level="ERROR")
    try:
        with RemoteVAE.from_app("demo") as vae:
            image: Image.Image = vae.decode(latent, image_format="png")
            return image
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    picture = Image.open(DEMO / "picture.png").convert("RGB")

    print("remote-vae demo: one latent, two doors")
    command = (sys.executable, "-m", "remote_vae_serve.cli", "run")
    server = LocalServer(command=command, environment=STOPS_SOON)
    try:
        ticks = dots()
        with step("start Ray and Serve (some 15 s)"):
            server.start(tick=lambda: next(ticks))
        with step(f"encode a picture of {picture.width}x{picture.height} and a clip in this process"):
            engine = demo_vae()
            latent = encode(engine, [picture])
            moving = encode(engine, clip()).transpose(0, 1)[None]
        with (
            step(f"decode {list(latent.shape)} over HTTP at {server.url}/demo"),
            RemoteVAE(f"{server.url}/demo") as vae,
        ):
            over_http = vae.decode(latent, image_format="png")
        with step(f"decode {list(moving.shape)} to an mp4 over HTTP"), RemoteVAE(f"{server.url}/demo") as vae:
            video = vae.decode(moving, output_type="mp4")
        with step("join the cluster, decode through a Ray handle"):
            over_handle = through_a_handle(server, latent)
    finally:
        # A second Ctrl-C must not leave a server behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with step("stop what was started"):
            server.stop()

    picture.save(out / "original.png")
    over_http.save(out / "decoded-http.png")
    over_handle.save(out / "decoded-handle.png")
    (out / "clip.mp4").write_bytes(video)
    beside = Image.new("RGB", (2 * picture.width + 8, picture.height), "white")
    beside.paste(picture, (0, 0))
    beside.paste(over_http, (picture.width + 8, 0))
    beside.save(out / "side-by-side.png")
    same = "the same pixels" if over_http.tobytes() == over_handle.tobytes() else "DIFFERENT pixels"
    print(f"\n  PSNR of the decoded picture {psnr(over_http, picture):.2f} dB; both doors gave {same}")
    for name in ("original.png", "decoded-http.png", "decoded-handle.png", "side-by-side.png", "clip.mp4"):
        print(f"  {(out / name).resolve()}")
    print(f"\nDone in {time.monotonic() - START:.0f} s.")


if __name__ == "__main__":
    # A plain kill ends the demo as Ctrl-C does: through `finally`. Set here too for a shell that starts us with it ignored.
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nStopped.", file=sys.stderr)
        os._exit(130)
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
