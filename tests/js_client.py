"""The JavaScript client's own tests in Node, against a model that is served, beside what the Python client makes of the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from limits import WAIT_S
from remote_vae import RemoteVAE
from samples import latents

FOLDER = Path(__file__).parents[1] / "client" / "js"
MODULE = FOLDER / "remote_vae.js"
OLDEST = 18


def why_no_node() -> str | None:
    """The reason to skip what needs Node; None where it runs."""
    node = shutil.which("node")
    if node is None:
        return "no Node on this machine"
    told = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    return None if int(told.strip("v\n").partition(".")[0]) >= OLDEST else f"Node {told.strip()} is older than {OLDEST}"


needs_node = pytest.mark.skipif(why_no_node() is not None, reason=str(why_no_node()))


def check_in_node(url: str, folder: Path) -> None:
    """Run them all against the model at the URL, one of the tiny Stable Diffusion VAEs of `samples`; none may be skipped."""
    _write_expected(url, folder)
    environment = os.environ | {"REMOTE_VAE_URL": url, "REMOTE_VAE_EXPECTED": str(folder)}
    command = ["node", "--test", str(FOLDER / "test" / "remote_vae.test.js")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * WAIT_S, check=False)
    counted = dict(re.findall(r"^. (pass|fail|skipped) (\d+)$", run.stdout, re.MULTILINE))
    assert run.returncode == 0, run.stdout
    assert (counted["fail"], counted["skipped"]) == ("0", "0"), run.stdout
    assert int(counted["pass"]) > 20


def _write_expected(url: str, folder: Path) -> None:
    """What the tests send, as raw numbers, and what comes back to Python."""

    def write(name: str, content: torch.Tensor | np.ndarray | bytes) -> None:
        data = content.numpy() if isinstance(content, torch.Tensor) else content
        (folder / name).write_bytes(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes())

    numbers = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    near_one = np.random.default_rng(1).normal(0, 3, 100_000).astype(np.float32)
    middles = (np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32) + np.float32(2**-25)).astype(
        np.float32
    )
    numbers = np.concatenate([numbers[np.isfinite(numbers)], near_one, middles])
    write("numbers.f32", numbers)
    with np.errstate(over="ignore"):
        write("numbers.f16", numbers.astype(np.float16))
    write("numbers.bf16", torch.from_numpy(numbers).bfloat16().view(torch.int16))
    z = latents(2, 4, 8, 8)
    write("latents.f32", z)
    with RemoteVAE(url) as vae:
        write("decoded.f32", vae.decode(z, output_type="pt"))
        pixels = vae.decode(z, output_type="pt", return_type="pt", partial_postprocess=True)
        write("seeded.f32", vae.encode(pixels, seed=7))
        for number, sample in enumerate(z):
            write(f"{number}.png", _png(url, sample[None], do_scaling=True))
        write("half.png", _png(url, z[:1].half(), do_scaling=False))
        write("encoded.f32", vae.encode((folder / "0.png").read_bytes(), sample_mode="argmax", do_scaling=True))


def _png(url: str, z: torch.Tensor, do_scaling: bool) -> bytes:
    """The file itself, as the server writes it."""
    query = {"shape": list(z.shape), "dtype": str(z.dtype).removeprefix("torch."), "do_scaling": str(do_scaling)}
    query["image_format"] = "png"
    headers = {"content-type": "tensor/binary", "accept": "image/png"}
    answer = requests.post(url, data=z.numpy().tobytes(), params=query, headers=headers, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    return answer.content
