"""Models that answer in this process: what `remote_vae_serve.http.app.create_app` needs, without Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from remote_vae.errors import UnknownModel
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae_serve.config import FakeEngineConfig, VAEConfig
from remote_vae_serve.engine.base import Engine
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.http.models import Answerer
from remote_vae_serve.replica.pipeline import Pipeline

Answer = Callable[[Request], Awaitable[Result]]


class InProcess:
    """The `Models` of the HTTP app: each name is anything that decodes."""

    def __init__(self, **models: Answer) -> None:
        self._models = models

    @contextmanager
    def place(self, name: str, client: str) -> Iterator[Answerer]:
        yield Answerer(self.find(name), _let_in)

    def find(self, name: str) -> Answer:
        try:
            return self._models[name]
        except KeyError:
            raise UnknownModel(f"No model {name[:80]!r} here; served: {self.names()}", parameter="model") from None

    def describe(self, name: str) -> ModelDescription:
        self.find(name)
        return ModelDescription(name=name, state="ready")

    async def wake(self, name: str) -> ModelDescription:
        return replace(self.describe(name), extra={"woken": True})

    def names(self) -> list[str]:
        return sorted(self._models)


async def _let_in(request: Request) -> None:
    """Whatever is announced."""


def fake_engine(channels: int = 4, decode_s: float = 0.0) -> Engine:
    engine = FakeEngine(FakeEngineConfig(channels=channels, decode_s=decode_s))
    engine.load()
    return engine


def diffusers_engine(folder: Path, **arguments: Any) -> DiffusersEngine:
    """Loaded on the CPU; eager in float32, with one thread and no company, so that results can be compared bit for bit."""
    exact: dict[str, Any] = {"engine": "eager", "dtype": "float32", "threads": 1, "batching": "off"}
    engine = DiffusersEngine(VAEConfig(source=str(folder), **exact | arguments), "cpu")
    engine.load()
    return engine


def pipeline_of(engine: Engine, model: str = "model") -> Pipeline:
    return Pipeline(engine, model)
