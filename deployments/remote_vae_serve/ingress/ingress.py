"""`Ingress`: the Serve deployment at `/`. Parses HTTP (`http`) and routes by model (`model_registry`) over Ray handles. Knows no
torch: it never touches a latent."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.types import ASGIApp

from remote_vae.errors import ModelFailed, ModelStarting
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports.handle import HandleTransport
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.http.app import Answerer, create_app
from remote_vae_serve.ingress.model_registry import ModelRegistry
from remote_vae_serve.proxy import behind_tokens

WATCH_S = 1.0


class Ingress:
    """The models of the cluster, as an HTTP app."""

    def __init__(self, config: IngressConfig) -> None:
        self._config = config
        self._registry = ModelRegistry(config.models)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this after the constructor and serves what it returns."""
        config = self._config
        app = create_app(self, config.max_body, config.request_timeout_s, config.hosts, config.has_connections)
        return behind_tokens(app)

    def find(self, name: str) -> Answerer:
        """The way to a model. Raises UnknownModel, ModelFailed or ModelStarting."""
        model = self._registry.get(name)
        if model.transport is not None:
            return partial(self._answer, model.transport, name)
        if model.state == "failed":
            raise ModelFailed(f"{name} could not be deployed: {model.reason}", retry_after=30)
        raise ModelStarting(f"{name} is being deployed; try again", retry_after=2)

    async def check_health(self) -> None:
        """The health check: Serve asks every few seconds, and replaces an ingress that raises three times in a row."""
        if (fault := self._registry.fault()) is not None:
            raise RuntimeError(f"The ingress is to be replaced: {fault}")

    async def _answer(self, transport: HandleTransport, name: str, request: Request) -> Result:
        """Send the request on; give up where the model's replica cannot be placed, which could last for ever."""
        answer = asyncio.ensure_future(transport.try_one_async(request))
        left_s = self._config.placement_wait_s
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=WATCH_S)
                if done:
                    result = answer.result()
                    self._registry.mended(name)
                    return result
                shortage = self._registry.get(name).shortage
                left_s = left_s - WATCH_S if shortage else self._config.placement_wait_s
                if shortage and left_s <= 0:
                    raise ModelStarting(f"{name} {shortage}; try again", retry_after=10)
        finally:
            answer.cancel()

    async def wake(self, name: str) -> ModelDescription:
        """What a replica says of the model; one is started where there is none."""
        self.find(name)
        transport = self._registry.get(name).transport
        assert transport is not None
        return await transport.describe_async(wake=True)

    def describe(self, name: str) -> ModelDescription:
        return self._registry.get(name).describe()

    def names(self) -> list[str]:
        return self._registry.names()
