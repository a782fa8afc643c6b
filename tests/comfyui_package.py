"""The ComfyUI nodes, loaded as ComfyUI loads them, beside a real server; and what its own VAE would make of the same."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

from in_process import Answer, InProcess, diffusers_engine, pipeline_of
from remote_vae import errors
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.http.app import create_app
from samples import latents, tiny_vae
from served import served

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
KINDS = ("sd", "flux", "tiny", "hunyuan")
COLD = "cold"
"""A model of the server that no replica has been started for."""
TINY = "for a tiny VAE of SD 1.x"


class Reported(InProcess):
    """Models that say of themselves what a replica does; of `COLD` no more than its name, until it is asked itself."""

    def __init__(self, engines: dict[str, DiffusersEngine]) -> None:
        self._pipelines = {name: pipeline_of(engine, name) for name, engine in engines.items()}
        super().__init__(**{name: pipeline.answer for name, pipeline in self._pipelines.items()})
        self._engines = engines
        self.asleep = True
        self.failing = False
        self.described = 0

    def find(self, name: str) -> Answer:
        model = super().find(name)
        return self._fail if name == COLD and self.failing else model

    async def _fail(self, _: Request) -> NoReturn:
        raise errors.ModelFailed("its weights are not there", retry_after=30)

    def describe(self, name: str) -> ModelDescription:
        self.described += 1
        described = super().describe(name)
        if name == COLD and (self.asleep or self.failing):
            return replace(described, state="failed" if self.failing else "cold")
        space = self._engines[name].space
        return replace(
            described, class_name=space.class_name, latent_channels=space.channels, spatial_ratio=space.ratio,
            temporal_ratio=space.temporal_ratio, video=space.family.media == "video",
        )  # fmt: skip

    async def wake(self, name: str) -> ModelDescription:
        self.asleep = False
        return self.describe(name)

    def close(self) -> None:
        for pipeline in self._pipelines.values():
            pipeline.close()


@dataclass(frozen=True)
class Served:
    """The models, and where they answer."""

    models: Reported
    url: str


@pytest.fixture(scope="module")
def nodes() -> Iterator[ModuleType]:
    """The package, under the name that ComfyUI makes of its path."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
        del sys.modules[loaded]


@pytest.fixture(scope="module")
def running(weights: Path) -> Iterator[Served]:
    engines = {kind: diffusers_engine(weights / kind) for kind in KINDS}
    models = Reported(engines | {COLD: diffusers_engine(weights / "sd")})
    with served(create_app(models, max_body=1 << 24, deadline_s=60)) as url:
        yield Served(models, url)
    models.close()


@pytest.fixture
def server(running: Served, nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its URL; ComfyUI was started with it in REMOTE_VAE_URL, just now."""
    monkeypatch.setenv("REMOTE_VAE_URL", running.url)
    monkeypatch.delenv("REMOTE_VAE_TOKEN", raising=False)
    part(nodes, "address")._listed.clear()
    running.models.asleep = True
    return running.url


def part(nodes: ModuleType, name: str) -> Any:
    return sys.modules[f"{nodes.__name__}.{name}"]


def run(nodes: ModuleType, node: str, **inputs: Any) -> Any:
    """The first output of a node, executed as ComfyUI does it."""
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    with torch.inference_mode():
        outputs = getattr(node_class(), node_class.FUNCTION)(**inputs)
    assert len(outputs) == len(node_class.RETURN_TYPES)
    return outputs[0]


def load(nodes: ModuleType, server: str, kind: str, **inputs: Any) -> Any:
    if kind == "tiny":
        inputs.setdefault("latents", TINY)
    return run(nodes, "RemoteVAE_Load", url=server, model=kind, **inputs)


local = functools.cache(tiny_vae)


def local_images(kind: str, z: torch.Tensor) -> torch.Tensor:
    """What `comfy.sd.VAE.decode` makes of them, by its formula."""
    with torch.inference_mode():
        pixels = local(kind).decode(z, return_dict=False)[0]
    return (pixels / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def local_latents(kind: str, pixels: torch.Tensor) -> torch.Tensor:
    """What `comfy.sd.VAE.encode` makes of pixels `[B, 3, ...]` in [0, 1]: the mode."""
    with torch.inference_mode():
        encoded = local(kind).encode(pixels.contiguous() * 2 - 1)
    return encoded.latents if kind == "tiny" else encoded.latent_dist.mode()


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


Z = {"sd": latents(2, 4, 6, 4), "flux": latents(1, 16, 4, 6), "hunyuan": latents(1, 4, 3, 4, 6)}
