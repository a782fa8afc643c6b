"""The models of the cluster and their states, as Serve and their replicas tell them. Reading it never wakes a replica.

A background thread asks Serve about once a second, so that a request finds its model in a dictionary.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from remote_vae.errors import BrokenReply, UnknownModel
from remote_vae.protocol.model_description import ModelDescription, State
from remote_vae.protocol.wire import PROTOCOL
from remote_vae.ray_internals import serve_details
from remote_vae.transports.handle import HandleTransport
from remote_vae.transports.retry import ENDLESS, RetryPolicy
from remote_vae_serve.http.app import RESERVED
from remote_vae_serve.ingress import application_details
from remote_vae_serve.ingress.path_publisher import PathPublisher
from remote_vae_serve.ingress.resource_shortages import Shortage, shortages
from remote_vae_serve.scaling import ASKED_FOR_S, ask_to_yield, gives_way, take_back

logger = logging.getLogger("ray.serve")

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
REFRESH_S = 1.0
ASK_AGAIN_S = 30.0  # a failed replica may have mended; asked more often, it would never look idle to the autoscaler
GRACE_S = 6.0  # a replica's process starts within it; longer, and what it lacks is held by others
DESCRIBE_TIMEOUT_S = 5.0
FIRST_READ_S = 20.0
START_S = 10.0
PROCESS_S = 3.0
STEPS = ("imports_s", "weights_s", "probe_s")
"""What a replica says of its own start, after that of its process."""
CHECKS_WITHOUT_NEWS = 6
"""A minute, at Serve's ten seconds a check. It is checks that count and not seconds, since it is Serve's controller that checks:
while it restarts there is no news, and it checks nobody."""


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        arguments: what its application was built with, as far as it describes the model.
        reason: why it is in this state; "" where there is nothing to say.
        running: ids of the replicas that answer.
        reported: what a replica last said of itself; None before the first.
        transport: the way to it; None where it failed to deploy.
        asked_at: when a replica was last asked, on the monotonic clock.
        shortage: what its first replica waits for; None if for nothing.
        places: requests that this ingress may have with its replicas at a time, or waiting for the first of them; None for no
            limit. Other ingresses have as many.
        start_s: seconds that a replica takes to start, as the last one told.
        mistake: why its last deploy failed, while replicas of the one before answer; "" where it did not.
    """

    name: str
    state: State
    arguments: ModelDescription
    reason: str = ""
    running: frozenset[str] = frozenset()
    reported: ModelDescription | None = None
    transport: HandleTransport | None = None
    asked_at: float = 0.0
    shortage: Shortage | None = None
    places: int | None = None
    start_s: float = START_S
    mistake: str = ""

    def describe(self) -> ModelDescription:
        """For `GET /<model>`."""
        known = self.arguments if self.reported is None else self.reported.or_else(self.arguments)
        mistake = f"Its last deploy failed, and the one before goes on: {self.mistake}" if self.mistake else ""
        reason = mistake or self.reason or known.reason
        return replace(known, name=self.name, state=self.state, reason=reason, replicas=len(self.running) or None)


@dataclass(frozen=True)
class Asked:
    """That a model was asked to yield: when, on the monotonic clock, and for whom."""

    at: float
    by: str


class ModelRegistry:
    """The models, kept up to date in the background; reading is thread-safe.

    Args:
        only: the applications to serve; every VAE application of the cluster if None.
        publisher: is told of the models' own paths.
    """

    def __init__(self, only: tuple[str, ...] | None = None, publisher: PathPublisher | None = None) -> None:
        self._only = only
        self._publisher = publisher
        self._models: Mapping[str, Model] = {}
        self._warned: set[str] = set()
        self._waiting_since: dict[str, float] = {}
        self._asked: dict[str, Asked] = {}
        self._ingresses = 1
        self._read_once = threading.Event()
        self._news = self._news_checked = self._checks_without_news = 0
        # Never on the caller's own thread, which is a replica's event loop: a replica is asked there by a blocking call.
        self._thread = threading.Thread(target=self._keep_fresh, name="model-registry", daemon=True)
        self._thread.start()
        self._read_once.wait(FIRST_READ_S)

    def names(self) -> list[str]:
        return sorted(self._models)

    def get(self, name: str) -> Model:
        """The model of that name. Raises UnknownModel naming those that are served."""
        try:
            return self._models[name]
        except KeyError:
            served = ", ".join(self.names()) or "none yet"
            raise UnknownModel(f"No model {name[:80]!r} here; served: {served}", parameter="model") from None

    def fault(self) -> str | None:
        """Why this process will hear no more of the models; None where it does. To be called at each of Serve's health checks."""
        if not self._thread.is_alive():
            return "the thread that reads Serve's state has ended"
        self._checks_without_news = 0 if self._news != self._news_checked else self._checks_without_news + 1
        self._news_checked = self._news
        if self._checks_without_news >= CHECKS_WITHOUT_NEWS:
            return f"nothing was read of Serve's state between {CHECKS_WITHOUT_NEWS} health checks"
        return None

    def refresh(self) -> None:
        """Read Serve's state once."""
        told = serve_details()
        self._news += 1
        applications = told["applications"]
        self._ingresses = application_details.ingresses(applications)
        waiting = shortages(applications, ray.cluster_resources(), ray.available_resources())
        models = {}
        for name, application in applications.items():
            if self._only is not None and name not in self._only:
                continue
            model = self._model(name, application, waiting.get(name))
            self._news += 1  # replicas that do not answer take seconds each
            if model is not None:
                models[name] = model
        if set(models) != set(self._models):
            http = told.get("http_options") or {}
            where = f"http://{http.get('host')}:{http.get('port')}"
            logger.info("Serving %s at %s/<model>", ", ".join(sorted(models)) or "no model yet", where)
        self._models = models
        if self._publisher is not None:
            self._publisher.tell(applications, models)
        self._have_them_yield(waiting)

    def _have_them_yield(self, waiting: Mapping[str, Shortage]) -> None:
        """Ask who holds what a model waits for; once that runs, take it back, so that they come again without delay."""
        now = time.monotonic()
        self._waiting_since = {name: self._waiting_since.get(name, now) for name in waiting}
        for name, shortage in waiting.items():
            if shortage.holders and (shortage.certain or now - self._waiting_since[name] > GRACE_S):
                # One at a time: the next is asked when this one turns out to be busy.
                holder = shortage.holders[int(now / ASKED_FOR_S) % len(shortage.holders)]
                ask_to_yield(holder)
                self._asked[holder] = Asked(now, name)
        still_asked = {holder for shortage in waiting.values() for holder in shortage.holders}
        for holder, asked in list(self._asked.items()):
            waiter = self._models.get(asked.by)
            if holder not in still_asked and waiter is not None and waiter.running:
                take_back(holder)
                del self._asked[holder]

    async def gives_way(self, name: str) -> bool:
        """Whether a model has yielded to another that does not run yet. Ray's control plane is asked, where it was asked to."""
        asked = self._asked.get(name)
        if asked is None or time.monotonic() - asked.at >= ASKED_FOR_S:
            return False
        try:
            return await asyncio.to_thread(gives_way, name)
        except Exception:  # the control plane restarts: a request is not to fail for a courtesy
            logger.warning("whether %s gives way could not be read", name, exc_info=True)
            return False

    def mended(self, name: str) -> None:
        """A model that was known as failed has answered: ask its replica anew at the next refresh. Where Serve only says that a
        deploy failed, that is how it is known that replicas of the one before answer."""
        model = self._models.get(name)
        if model is not None and model.state == "failed":
            running = model.running or frozenset({"one that answered"})
            self._models = {**self._models, name: replace(model, asked_at=-ASK_AGAIN_S, running=running)}

    def _keep_fresh(self) -> None:
        while True:
            try:
                self.refresh()
            except Exception:  # the controller restarts now and then; the last known state serves meanwhile
                logger.warning("Serve's state could not be read", exc_info=True)
            self._read_once.set()
            time.sleep(REFRESH_S)

    def _model(self, name: str, application: Mapping[str, Any], shortage: Shortage | None) -> Model | None:
        """The model that an application is, or None where it is none of ours."""
        known = self._models.get(name)
        deployment = application["deployments"].get("VAE")
        if deployment is None:
            return self._without_deployment(name, application, known)
        user_config = deployment["deployment_config"].get("user_config") or {}
        if user_config.get("protocol") != PROTOCOL:
            return self._refused(name, f"its VAE deployment does not speak handle protocol {PROTOCOL}")
        if not NAME.fullmatch(name) or name in RESERVED:
            return self._refused(name, "its name is reserved or not of the form [a-z0-9][a-z0-9._-]*")
        try:
            arguments = ModelDescription.from_plain(user_config)
        except BrokenReply as error:
            return self._refused(name, f"its VAE deployment is of another version of remote-vae: {error}")
        running = application_details.running(deployment)
        transport = known.transport if known and known.transport else _transport_to(name)
        places = application_details.places(deployment["deployment_config"], len(running), self._ingresses)
        if not running:
            start_s = known.start_s if known else START_S
            # What the last replica told holds for the next, but for where it ran; of other arguments it tells nothing.
            told_last = known.reported if known and known.arguments == arguments else None
            last = told_last and replace(told_last, gpu_ids=None)
            if application_details.is_coming(deployment):
                why = str(shortage) if shortage else ""
                return Model(name, "starting", arguments, why, reported=last, transport=transport, shortage=shortage,
                             places=places, start_s=start_s)  # fmt: skip
            if known and known.state == "failed":  # idle, it went; what it said stands until the next one starts
                return replace(known, arguments=arguments, running=running, transport=transport, places=places)
            return Model(name, "cold", arguments, reported=last, transport=transport, places=places, start_s=start_s)
        told = known and known.state == "ready" and known.reported
        settled = told or (known and time.monotonic() < known.asked_at + ASK_AGAIN_S)
        if known and settled and known.running == running:
            return replace(known, mistake="", places=places)
        reported = _ask(name) or (known.reported if known else None)
        failed = reported is not None and reported.state == "failed"
        reason = (reported.reason if reported else None) or ""
        asked_at = time.monotonic()
        state: State = "failed" if failed else "ready"
        start_s = _start_s(reported) or (known.start_s if known else START_S)
        return Model(name, state, arguments, reason, running, reported, transport, asked_at, places=places,
                     start_s=start_s)  # fmt: skip

    def _without_deployment(self, name: str, application: Mapping[str, Any], known: Model | None) -> Model | None:
        """An application whose builder failed, or has not run yet, has no deployments; its config tells whether it is a VAE."""
        config = application.get("deployed_app_config") or {}
        if config.get("import_path") != "remote_vae_serve.app:vae":
            return None
        arguments = application_details.described_by(config.get("args") or {})
        if not str(application["status"]).endswith("DEPLOY_FAILED"):
            return known or Model(name, "starting", arguments)
        mistake = application_details.sentence(application["message"])
        if known and known.running:
            return self._as_before(known, mistake)
        # Where it was deployed before, Serve has replicas of that time, or starts them; an ingress that is new cannot tell.
        return Model(name, "failed", arguments, mistake, transport=known.transport if known else _transport_to(name))

    def _as_before(self, known: Model, mistake: str) -> Model:
        """A model that ran when its next deploy failed: Serve leaves its replicas be, and they are asked now and then."""
        if known.mistake == mistake and time.monotonic() < known.asked_at + ASK_AGAIN_S:
            return known
        if (reported := _ask(known.name)) is None:
            return Model(known.name, "failed", known.arguments, mistake, transport=known.transport)
        state: State = "failed" if reported.state == "failed" else "ready"
        return replace(known, state=state, reported=reported, asked_at=time.monotonic(), mistake=mistake)

    def _refused(self, name: str, why: str) -> Model | None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("application %s is not served: %s", name, why)
        return None


def _transport_to(name: str) -> HandleTransport | None:
    try:
        return HandleTransport.of_app(name, ENDLESS)
    except UnknownModel:
        return None  # not there yet; the next refresh tries again


def _start_s(reported: ModelDescription | None) -> float | None:
    """What the start of a replica took, that of its process included; None where it does not say."""
    took = (reported.startup if reported else None) or {}
    return PROCESS_S + sum(took.get(step, 0.0) for step in STEPS) if took else None


def _ask(name: str) -> ModelDescription | None:
    """What a running replica says of itself; None if it does not answer soon."""
    try:
        return HandleTransport.of_app(name, RetryPolicy(DESCRIBE_TIMEOUT_S)).describe()
    except Exception as error:
        logger.warning("a replica did not describe itself: %s", error)
        return None
