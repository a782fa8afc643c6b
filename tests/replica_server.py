"""Real replicas of tiny models in this process, over HTTP, for tests of the client in diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import serve

from in_process import InProcess
from remote_vae import RemoteVAE
from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.http.app import create_app
from remote_vae_serve.replica.replica import VAE
from samples import KINDS, tiny_vae
from served import served
from tiny_pipelines import arguments, output, pipeline

HALF = "sdxl-half"
"""An SDXL VAE whose weights lose nothing in float16, so that a pipeline in float16 can be compared bit for bit."""


class Replicas(InProcess):
    """Real replicas behind the HTTP app; what Ray and Serve tell a replica is made up with `patch`."""

    def __init__(self, sources: dict[str, Path], patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ray, "get_gpu_ids", list)
        self.replicas: dict[str, VAE] = {}
        for name, source in sources.items():
            patch.setattr(serve, "get_replica_context", partial(SimpleNamespace, app_name=name, replica_tag=name))
            self.replicas[name] = VAE(
                VAEConfig(source=str(source), device="cpu", engine="eager", dtype="float32", threads=1)
            )
        super().__init__(**{name: partial(self._answer, replica) for name, replica in self.replicas.items()})
        self.asked: list[str] = []
        self.error: Exception | None = None

    async def _answer(self, replica: VAE, request: Request) -> Result:
        self.asked.append(request.verb)
        if self.error is not None:
            raise self.error
        return Result.from_plain(await getattr(replica, request.verb)(request.to_plain()))

    async def wake(self, name: str) -> ModelDescription:
        self.find(name)
        self.asked.append("describe")
        return await self.replicas[name].wake()


class Server:
    """The replicas at a URL."""

    def __init__(self, models: Replicas, url: str) -> None:
        self.models, self.url = models, url

    def vae(self, name: str, **options: Any) -> RemoteAutoencoder:
        return RemoteVAE(f"{self.url}/{name}", **({"retries": 0, "timeout": 60} | options)).as_autoencoder()


@pytest.fixture(scope="module")
def running(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("half")
    half_vae().save_pretrained(folder / HALF)
    nothing = tmp_path_factory.mktemp("nothing")
    sources = {kind: weights / kind for kind in KINDS} | {HALF: folder / HALF, "failed": nothing}
    with pytest.MonkeyPatch.context() as patch:
        models = Replicas(sources, patch)
        app = create_app(models, max_body=1 << 24, deadline_s=60)
        with served(app) as url:
            yield Server(models, url)


@pytest.fixture
def server(running: Server) -> Server:
    running.models.asked.clear()
    running.models.error = None
    return running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SD pipeline, its tokenizer's files beside it."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline("sd", tiny_vae("sd"), folder / "words").save_pretrained(folder / "sd")
    return folder


def half_vae() -> Any:
    return tiny_vae("sdxl").half().float()


def in_rows(vae: Any) -> Any:
    """The VAE, with the moments of its encoder contiguous: a tensor that travelled has its values and not its strides. torch
    may lay a convolution's output channels last, and all that comes after it then differs in the last bit."""
    (getattr(vae, "quant_conv", None) or vae.encoder).register_forward_hook(lambda *call: call[-1].contiguous())
    return vae


def pixels_of(pipe: Any, kind: str, image_to_image: bool = False, batch: int = 1, **changes: Any) -> torch.Tensor:
    pixels = output(pipe(**arguments(kind, image_to_image, batch) | changes))
    assert pixels.float().std() > 0.1, "a grey picture hides every mistake"
    return pixels
