"""`VAE`: the Serve deployment of one model. A replica holds the weights; it is called by the ingress and by generator
actors, with the same plain tuples. Knows no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from starlette.types import ASGIApp

from remote_vae import errors
from remote_vae.errors import ModelFailed, RemoteVAEError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request, announced_from_plain
from remote_vae.protocol.result import Result
from remote_vae_serve.admission import Admission
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.http.app import create_model_app
from remote_vae_serve.http.models import Answerer
from remote_vae_serve.proxy import guarded
from remote_vae_serve.replica.description import describe_arguments, describe_engine
from remote_vae_serve.replica.event_counters import EventCounters
from remote_vae_serve.replica.handing_back import HandedBack, HandingBack, handed_back_of
from remote_vae_serve.replica.handing_on import HandingOn
from remote_vae_serve.replica.refusal_log import RefusalsWithoutTracebacks
from remote_vae_serve.replica.usage import Usage
from remote_vae_serve.scaling import USED

if TYPE_CHECKING:
    from remote_vae_serve.engine.base import Engine, Event
    from remote_vae_serve.replica.pipeline import Pipeline

logger = logging.getLogger("ray.serve")

WITHOUT_TRACEBACKS = RefusalsWithoutTracebacks()


class VAE:
    """One replica of one model.

    A model that cannot be loaded does not raise here: Serve would start the replica again for ever, showing nobody the
    reason. The replica comes up failed instead, answers every request with the reason, and tries again after
    `retry_s` at the next request.

    Args:
        config: with `num_gpus` resolved to a number.
    """

    def __init__(self, config: VAEConfig) -> None:
        self._config = config
        context = serve.get_replica_context()
        self._model = context.app_name
        self._admission = Admission(self._model)
        self._usage = Usage()
        self._handing_back = HandingBack(context.replica_tag)
        self._handing_on = HandingOn(self._model, context.replica_tag)
        self._pipeline: Pipeline | None = None
        self._engine: Engine | None = None
        self._failure: ModelFailed | None = None
        self._next_try = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._startup: dict[str, float] = {}
        self._events = EventCounters(self._model)
        logger.addFilter(WITHOUT_TRACEBACKS)
        self._load()

    @property
    def name(self) -> str:
        return str(self._model)

    async def decode(self, plain: tuple[Any, ...], handed_back: HandedBack | None = None) -> tuple[Any, ...]:
        """Decode one request: `DecodeRequest.to_plain()` in, `Result.to_plain()` out.

        Args:
            handed_back: of whom the request was handed back so far; None where this replica is to keep it. With it, a pair may
                be the answer, to be added to it: this replica's name, and the seconds of work before the request. Ask again,
                another may be free. Serve spreads requests by their number, which takes a video of ten seconds for as much as an
                image of 20 ms.

        Raises:
            RemoteVAEError: what went wrong; Overloaded where the client has its share of the queue, and nothing was handed back.
        """
        return await self._answer(DecodeRequest.from_plain, plain, handed_back)

    async def encode(self, plain: tuple[Any, ...], handed_back: HandedBack | None = None) -> tuple[Any, ...]:
        """Encode one request: `EncodeRequest.to_plain()` in, `Result.to_plain()` out; else as `decode`."""
        return await self._answer(EncodeRequest.from_plain, plain, handed_back)

    async def _answer(
        self, read: Callable[[tuple[Any, ...]], Request], plain: tuple[Any, ...], handed_back: HandedBack | None
    ) -> tuple[Any, ...]:
        try:
            with self._usage.request():
                return await self._answer_in_turn(read(plain), handed_back_of(handed_back))
        except BaseException as error:
            errors.let_go_of_frames(error)  # they hold the latents
            raise

    async def _answer_in_turn(self, request: Request, handed_back: HandedBack | None) -> tuple[Any, ...]:
        pipeline = await self._ready()
        if not handed_back:
            self._admission.check(request.client, self._config.max_requests)
        if handed_back is not None and (wait_s := pipeline.long_wait_s(request)) is not None:
            hold_s = self._handing_back.hold_s(wait_s, handed_back)
            if hold_s is not None:
                # Meanwhile it counts here, and Serve's router sends the next ones elsewhere.
                await asyncio.sleep(hold_s)
                if (wait_s := pipeline.long_wait_s(request)) is not None:
                    return (self._handing_back.replica, wait_s)
        with self._admission.place(request.client):
            return (await pipeline.answer(request)).to_plain()

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[Answerer]:
        """A place for a request that came by this replica's own HTTP side. Raises Overloaded."""
        self._admission.check(client, self._config.max_requests)
        with self._usage.request(), self._admission.place(client):
            yield Answerer(self.answer, self._announced)

    async def announce(self, verb: str, plain: tuple[Any, ...]) -> float:
        """Seconds until a request whose bytes have not come yet would have its turn here: `announced_to_plain()` in. Raises what
        `decode` and `encode` would, as far as it can be told without them."""
        return await self._announced_wait_s(announced_from_plain(verb, plain))

    async def _announced(self, request: Request) -> None:
        self._admission.check_turn(await self._announced_wait_s(request), request.deadline_s)

    async def _announced_wait_s(self, request: Request) -> float:
        return await (await self._ready()).announce(request)

    async def describe(self, wake: bool = False) -> dict[str, Any]:
        """The model as this replica sees it: `ModelDescription.to_plain()`. `wake` has a failed one try again, if it is time."""
        return (await self.wake() if wake else self.description()).to_plain()

    async def wake(self) -> ModelDescription:
        """The model after a failed one has tried again, if it was time."""
        with contextlib.suppress(ModelFailed):  # it is told in the description
            await self._ready()
        return self.description()

    def description(self) -> ModelDescription:
        """The model as this replica sees it now."""
        fault = self._fault()
        reason = self._failure.message if self._failure else fault and f"it is being replaced: {fault}"
        description = replace(
            describe_arguments(self._config),
            name=self._model,
            state="failed" if reason else "ready",
            reason=reason,
        )
        if self._engine is None:
            return description
        about = replace(describe_engine(self._engine), startup=self._startup, gpu_ids=tuple(ray.get_gpu_ids()))
        return about.or_else(description)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this after the constructor: the direct door, where the application has a path of its own."""
        config = self._config
        app = create_model_app(
            self._model,
            SingleModel(self),
            config.max_body,
            config.request_timeout_s,
            config.has_connections,
            config.max_bodies,
            config.proxies,
        )
        return guarded(app, config.allow_origins)

    async def answer(self, request: Request) -> Result:
        """Decode or encode one request that came by this replica's own HTTP side. Raises RemoteVAEError."""
        pipeline = await self._ready()
        wait_s = pipeline.long_wait_s(request)
        elsewhere = None if wait_s is None else await self._handing_on.answer(request, wait_s)
        return elsewhere or await pipeline.answer(request)

    async def check_health(self) -> None:
        """The health check: Serve asks every few seconds, and replaces a replica that raises three times in a row.

        One whose model could not be loaded is well: the next would fail as it did, and nobody would hear why.
        """
        if (fault := self._fault()) is not None:
            raise RuntimeError(f"{self._model} is to be replaced: {fault}")

    def _fault(self) -> str | None:
        return None if self._pipeline is None else self._pipeline.fault()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks about once a second, and hands what it heard to the autoscaling policy."""
        return {USED: self._usage.since_last()}

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve asks for this method where a deployment has a `user_config`; ours is a notice for the ingress to read."""

    def _load(self) -> None:
        began, started = time.time(), time.monotonic()
        try:
            from remote_vae_serve.replica.health import Probe
            from remote_vae_serve.replica.pipeline import Pipeline

            engine = build_engine(self._config, self._events.count)
            imported = time.monotonic()
            engine.load()
            loaded = time.monotonic()
            probe = Probe(engine)
            pipeline = Pipeline(engine, self._model, probe.fault)
        except Exception as error:  # out of the constructor it would have Serve start the replica again for ever
            known = error if isinstance(error, RemoteVAEError) else None
            reason = known.message if known else f"it could not be loaded: {type(error).__name__}: {error}"[:600]
            self._failure = ModelFailed(reason, retry_after=self._config.retry_s)
            self._next_try = time.monotonic() + self._config.retry_s
            logger.error("%s cannot serve: %s", self._model, reason, exc_info=None if known else error)
            return
        self._failure, self._engine, self._pipeline = None, engine, pipeline
        self._startup = {
            "began": began,
            "imports_s": round(imported - started, 3),
            "weights_s": round(loaded - imported, 3),
            "probe_s": round(time.monotonic() - loaded, 3),
        }
        logger.info("%s is ready on %s after %.1f s", self._model, engine.device, time.monotonic() - started)

    async def _ready(self) -> Pipeline:
        if self._pipeline is None:
            if self._loading is None and time.monotonic() >= self._next_try:
                self._loading = asyncio.ensure_future(self._load_again())
            if self._loading is not None:
                # Who gives up meanwhile leaves it to the others: the thread would go on beside the next one's.
                await asyncio.shield(self._loading)
            if self._failure is not None:
                raise ModelFailed(self._failure.message, retry_after=self._config.retry_s)
        assert self._pipeline is not None
        return self._pipeline

    async def _load_again(self) -> None:
        try:
            await asyncio.to_thread(self._load)
        finally:
            self._loading = None


class SingleModel:
    """The `Models` of the direct door: the one that this replica holds."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae

    def place(self, name: str, client: str) -> contextlib.AbstractContextManager[Answerer]:
        return self._vae.place(client)

    def describe(self, name: str) -> ModelDescription:
        return self._vae.description()

    async def wake(self, name: str) -> ModelDescription:
        return await self._vae.wake()

    def names(self) -> list[str]:
        return [self._vae.name]


def build_engine(config: VAEConfig, on_event: Callable[[Event], object]) -> Engine:
    """The engine of a model, on the device that this replica was given. Raises ModelFailed."""
    if config.fake is not None:
        from remote_vae_serve.engine.fake import FakeEngine

        return FakeEngine(config.fake, on_event)
    import torch

    from remote_vae_serve.engine.diffusers_engine import DiffusersEngine

    assigned = len(ray.get_gpu_ids())
    return DiffusersEngine(config, resolve_device(config, assigned, torch.cuda.is_available()), on_event)


def resolve_device(config: VAEConfig, assigned: int, cuda: bool) -> str:
    """`cpu` or `cuda` for a replica to which Ray assigned so many GPUs.

    Raises:
        ModelFailed: the arguments ask for a GPU, and this replica has none or cannot use it.
    """
    if config.device == "cpu":
        return "cpu"
    wanted = config.num_gpus != "auto" and config.num_gpus > 0
    if assigned == 0 and (wanted or config.device == "cuda"):
        raise ModelFailed(
            f"device is {config.device} and num_gpus {config.num_gpus}, but Ray assigned this replica no GPU. "
            "Does serve_config.yaml set ray_actor_options? They replace those of the model, its GPU included: "
            "set num_gpus and num_cpus under args instead"
        )
    if assigned and not cuda:
        raise ModelFailed(
            "Ray assigned this replica a GPU, but torch cannot use CUDA here: install a CUDA build of torch, "
            "or set device: cpu"
        )
    return "cuda" if assigned else "cpu"
