"""The user's command, run in this process or in one of its own, and a server of tiny models that it can ask."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae.cli import main
from remote_vae.errors import render
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.http.app import create_app
from samples import latents
from scripted_server import ScriptedServer
from served import served

SCRIPT = Path(sys.executable).with_name("remote-vae")


class Described(InProcess):
    """As an ingress describes its models."""

    def describe(self, name: str) -> ModelDescription:
        described = super().describe(name)
        if name == "tiny":
            return replace(described, state="failed", reason="no\nsuch folder")
        return replace(described, latent_channels=4, spatial_ratio=8, class_name="AutoencoderKL", video=False)


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[str]:
    """The address of a server with tiny models."""
    pipelines = {
        kind: pipeline_of(diffusers_engine(weights / kind), kind) for kind in ("sd", "flux", "hunyuan", "tiny")
    }
    app = create_app(Described(**{kind: p.answer for kind, p in pipelines.items()}), max_body=2**22, deadline_s=60)
    with served(app) as url:
        yield url
    for pipeline in pipelines.values():
        pipeline.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("REMOTE_VAE_TOKEN", "REMOTE_VAE_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def z(here: Path) -> torch.Tensor:
    """The latents in latent.safetensors."""
    made = latents(1, 4, 8, 12)
    save_file({"latents": made}, "latent.safetensors")
    return made


def command(*arguments: str | Path, stdin: bytes | None = None, **environment: str) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*arguments: str | Path, **options: Any) -> Result:
    result = command(*arguments, **options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def script(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def failing(error: Exception) -> ScriptedServer:
    return ScriptedServer(lambda exchange: exchange.reply(*render(error)))  # type: ignore[arg-type]


def some_latents(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        np.save(folder / f"{number}.npy", latents(1, 4, 8, 8, seed=number).numpy())
    return folder


def png() -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pixels_of(path: str | io.BytesIO, image_format: str = "PNG") -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        assert image.format == image_format
        return np.asarray(image)
