"""`Ingress`: the Serve deployment at `/`. Parses HTTP (`http`) and routes by model (`model_registry`) over Ray handles. Knows no
torch: it never touches a latent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ray import serve
from starlette.types import ASGIApp

from remote_vae.errors import BadRequest, ModelFailed, ModelStarting, Overloaded, RemoteVAEError
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports.handle import HandleTransport
from remote_vae_serve.admission import Admission
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.http.app import create_app
from remote_vae_serve.http.models import Answerer
from remote_vae_serve.ingress.by_ingress import ByIngress
from remote_vae_serve.ingress.model_registry import Model, ModelRegistry
from remote_vae_serve.ingress.path_publisher import PathPublisher
from remote_vae_serve.proxy import guarded

WATCH_S = 1.0
GIVING_WAY_S = 0.2


class Ingress:
    """The models of the cluster, as an HTTP app."""

    def __init__(self, config: IngressConfig) -> None:
        self._config = config
        self._registry = ModelRegistry(config.models, PathPublisher(serve.get_replica_context().app_name))
        self._admissions: dict[str, Admission] = {}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this after the constructor and serves what it returns."""
        config = self._config
        app = create_app(
            self,
            config.max_body,
            config.request_timeout_s,
            config.hosts,
            config.has_connections,
            config.max_bodies,
            config.proxies,
        )
        app.add_middleware(ByIngress)
        return guarded(app, config.allow_origins)

    @contextmanager
    def place(self, name: str, client: str) -> Iterator[Answerer]:
        """The way to a model, with a place in its queue. Raises UnknownModel, ModelFailed or ModelStarting; Overloaded where the
        client has its share of the queue already."""
        model = self._registry.get(name)
        transport = _transport(model)
        admission = self._admissions.setdefault(name, Admission(name))
        admission.check(client, model.places, _start_s(model))
        with admission.place(client):
            yield Answerer(
                partial(self._answer, transport, name, admission), partial(self._announce, transport, name, admission)
            )

    async def check_health(self) -> None:
        """The health check: Serve asks every few seconds, and replaces an ingress that raises three times in a row."""
        if (fault := self._registry.fault()) is not None:
            raise RuntimeError(f"The ingress is to be replaced: {fault}")

    async def _announce(self, transport: HandleTransport, name: str, admission: Admission, request: Request) -> None:
        """Ask a replica, where one runs, whether a request will be answered whose body has not come yet. Raises BadRequest,
        ModelFailed, or Overloaded where its turn would come too late; whatever else there is, the request itself will hear."""
        model = self._registry.get(name)
        if not model.running:
            return
        try:
            wait_s = await transport.announce_async(request)
        except (BadRequest, ModelFailed):
            raise
        except RemoteVAEError:
            return
        # Of several another may be free, and is found by handing back; after a mistake it is not known how many there are.
        if len(model.running) == 1 and not model.mistake:
            admission.check_turn(wait_s, request.deadline_s)

    async def _answer(self, transport: HandleTransport, name: str, admission: Admission, request: Request) -> Result:
        """Send the request on. Raises what its replica does; Overloaded, with the time until there is room."""
        try:
            return await self._placed(transport, name, request)
        except Overloaded as error:
            # Of Serve's router, which cannot say when there will be room; or the other ingress has let in more.
            raise admission.full(_start_s(self._registry.get(name))) from error

    async def _placed(self, transport: HandleTransport, name: str, request: Request) -> Result:
        """Send the request on; give up where the model's replica cannot be placed, which could last for ever. Where others
        hold what it lacks for a short turn only, the request waits for its own as long as it may."""
        while await self._registry.gives_way(name):
            await asyncio.sleep(GIVING_WAY_S)
        left_s = self._config.placement_wait_s
        answer = asyncio.ensure_future(transport.try_one_async(request))
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=WATCH_S)
                if done:
                    result = answer.result()
                    self._registry.mended(name)
                    return result
                shortage = self._registry.get(name).shortage
                is_stuck = shortage is not None and shortage.turn_s > self._config.placement_wait_s
                left_s = left_s - WATCH_S if is_stuck else self._config.placement_wait_s
                if left_s <= 0:
                    raise ModelStarting(f"{name} {shortage}; try again", retry_after=10)
        finally:
            answer.cancel()

    async def wake(self, name: str) -> ModelDescription:
        """What a replica says of the model; one is started where there is none."""
        return await _transport(self._registry.get(name)).describe_async(wake=True)

    def describe(self, name: str) -> ModelDescription:
        return self._registry.get(name).describe()

    def names(self) -> list[str]:
        return self._registry.names()


def _transport(model: Model) -> HandleTransport:
    if model.transport is not None:
        return model.transport
    if model.state == "failed":
        raise ModelFailed(f"{model.name} could not be deployed: {model.reason}", retry_after=30)
    raise ModelStarting(f"{model.name} is being deployed; try again", retry_after=2)


def _start_s(model: Model) -> float | None:
    """Seconds until a replica of it will answer; None where one does."""
    return None if model.running else model.start_s
