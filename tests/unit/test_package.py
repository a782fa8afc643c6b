"""What is shipped: the wheel holds everything, and works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # builds the wheel and installs it
ROOT = Path(__file__).parents[2]
DECODE = """
import remote_vae, remote_vae_serve
from pathlib import Path
here = Path(remote_vae_serve.__file__)
assert here.is_relative_to({site!r}), here
import asyncio, torch
from remote_vae.calls.decode_call import DecodeCall
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.replica.pipeline import Pipeline
engine = DiffusersEngine(VAEConfig(source="demo"), "cpu")
engine.load()
call = DecodeCall(torch.randn(1, 16, 8, 8))
image = call.answer([asyncio.run(Pipeline(engine, "demo").decode(request)) for request in call.requests()])
print(image.size)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_the_demo_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    demo = "remote_vae_serve/demo/"
    assert {"remote_vae/py.typed", "remote_vae_serve/py.typed", demo + "config.json", demo + "picture.png"} <= names
    assert "remote_vae_serve/serve_config.yaml" in names
    weights = zipfile.ZipFile(wheel).getinfo(demo + "diffusion_pytorch_model.safetensors")
    assert weights.file_size <= 4 * 2**20
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_the_wheel_installed_elsewhere_decodes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    run = subprocess.run(
        [sys.executable, "-c", DECODE.format(site=str(site))],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(64, 64)"
