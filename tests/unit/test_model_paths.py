"""Under HAProxy each model has a path of its own; what comes there while it has no replica is sent to the ingress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema
from starlette.types import Message, Scope

from remote_vae_serve import published_paths
from remote_vae_serve.http.responses import BY_PROXY
from remote_vae_serve.ingress import path_publisher
from remote_vae_serve.ingress.by_ingress import ByIngress
from remote_vae_serve.ingress.path_publisher import PathPublisher
from remote_vae_serve.middleware.to_ingress import ToIngress
from remote_vae_serve.model_paths import with_model_paths

INGRESS = {"name": "remote-vae", "route_prefix": "/", "import_path": "remote_vae_serve.app:ingress"}


def model(name: str, path: str | None = None, **args: Any) -> dict[str, Any]:
    return {
        "name": name, "route_prefix": path, "import_path": "remote_vae_serve.app:vae", "args": {"source": "demo", **args},
    }  # fmt: skip


def paths(*applications: Mapping[str, Any]) -> dict[str, Any]:
    """Each application's path afterwards, in what Serve takes for a configuration."""
    config = with_model_paths({"proxy_location": "EveryNode", "applications": list(applications)})
    assert config["proxy_location"] == "EveryNode"
    ServeDeploySchema.model_validate(config)
    return {application["name"]: application["route_prefix"] for application in config["applications"]}


def test_every_model_gets_one_and_who_has_one_keeps_it() -> None:
    other = {"name": "other", "route_prefix": None, "import_path": "somebody.elses:app"}
    assert paths(INGRESS, model("sd"), model("flux", "/mine"), other) == {
        "remote-vae": "/", "sd": "/sd", "flux": "/mine", "other": None,
    }  # fmt: skip


def test_a_model_whose_path_somebody_else_has_gets_none() -> None:
    other = {"name": "other", "route_prefix": "/sd", "import_path": "somebody.elses:app"}
    assert paths(INGRESS, other, model("sd"), model("flux")) == {
        "remote-vae": "/", "other": "/sd", "sd": None, "flux": "/flux",
    }  # fmt: skip


def test_a_model_that_the_ingress_does_not_serve_gets_none() -> None:
    assert paths(INGRESS | {"args": {"models": ["sd"]}}, model("sd"), model("flux"))["flux"] is None


@pytest.mark.parametrize("ingress", [[], [INGRESS | {"route_prefix": "/vae"}]], ids=["none", "elsewhere"])
def test_without_an_ingress_at_the_root_nothing_changes(ingress: list[dict[str, Any]]) -> None:
    assert paths(*ingress, model("sd"))["sd"] is None


def test_what_holds_at_the_ingress_holds_there_too_but_for_what_the_model_says_itself() -> None:
    ingress = INGRESS | {"args": {"max_body_mib": 8, "request_timeout_s": 20, "placement_wait_s": 3}}
    models = [model("sd"), model("flux", max_body_mib=16, deadline_s=5), model("own", "/own")]
    made = with_model_paths({"applications": [ingress, *models]})["applications"]
    assert made[1]["args"] == {"source": "demo", "max_body_mib": 8, "request_timeout_s": 20}
    assert made[2]["args"] == {"source": "demo", "max_body_mib": 16, "deadline_s": 5}
    assert [made[0], made[3]] == [ingress, models[2]]


def goes(path: str, paths: Any, root: str = "", kind: str = "http") -> str:
    """Where a request to the fallback proxy ends up."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    async def read() -> Message:
        raise AssertionError("nobody reads a body for this")

    async def sent(message: Message) -> None: ...

    scope = {"type": kind, "path": root + path, "root_path": root}
    asyncio.run(ToIngress(app, paths)(scope, read, sent))
    assert scope["path"] == root + path
    return seen[0]


PATHS = {"/sd": "sd", "/mine": "flux", "/mine/own": "wan"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/sd", "/~/sd"),
        ("/sd/", "/~/sd/"),
        ("/sd/decode", "/~/sd/decode"),
        ("/sd-xl", "/sd-xl"),
        ("/mine/describe", "/~/flux/describe"),
        ("/mine/own/decode", "/~/wan/decode"),
        ("/", "/"),
        ("/models", "/models"),
        ("/-/healthz", "/-/healthz"),
    ],
)
@pytest.mark.parametrize("root", ["", "/below"])
def test_the_fallback_proxy_sends_what_is_for_a_model_to_the_ingress(path: str, expected: str, root: str) -> None:
    assert goes(path, lambda: PATHS, root) == root + expected


def test_nothing_but_requests_is_looked_at() -> None:
    def never() -> Mapping[str, str]:
        raise AssertionError

    assert goes("/sd", never, kind="lifespan") == "/sd"


def test_where_the_paths_cannot_be_read_serve_finds_its_way() -> None:
    def fails() -> Mapping[str, str]:
        raise ConnectionError

    assert goes("/sd", fails) == "/sd"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/~/sd", "/sd"), ("/~/sd/decode", "/sd/decode"), ("/sd", "/sd"), ("/~", "/~"), ("/~sd", "/~sd")],
)
@pytest.mark.parametrize("root", ["", "/below"])
def test_the_ingress_answers_in_the_words_of_the_models_path(path: str, expected: str, root: str) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(ByIngress(app)({"type": "http", "path": root + path, "root_path": root}, None, None))  # type: ignore[arg-type]
    assert seen[0]["path"] == root + expected
    assert (BY_PROXY in seen[0]) == (path != expected), "a large reply would pile up on its way through Serve's proxy"


class Store:
    """Ray's key-value store, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.now = time.time()
        self.puts = 0
        monkeypatch.setattr(published_paths, "key_value_store", lambda: (self.kept.get, self.put))
        monkeypatch.setattr(published_paths.time, "time", lambda: self.now)
        monkeypatch.setattr(path_publisher.time, "monotonic", lambda: self.now)

    def put(self, key: bytes, value: bytes, overwrite: bool) -> None:
        assert overwrite
        self.puts += 1
        self.kept[key] = value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


APPLICATIONS = {"remote-vae": {"route_prefix": "/"}, "sd": {"route_prefix": "/sd"}, "flux": {"route_prefix": None}}


def test_the_ingress_tells_the_paths_once_and_again_before_they_are_forgotten(store: Store) -> None:
    publisher = PathPublisher("remote-vae")
    assert published_paths.published() == {}
    for _ in range(int(published_paths.VALID_S) * 3):
        publisher.tell(APPLICATIONS, ["sd", "flux"])
        assert published_paths.published() == {"/sd": "sd"}
        store.now += 1
    assert 3 < store.puts < 12
    publisher.tell(APPLICATIONS, ["flux"])
    assert published_paths.published() == {}


def test_paths_of_an_ingress_that_is_no_more_are_forgotten(store: Store) -> None:
    PathPublisher("remote-vae").tell(APPLICATIONS, ["sd"])
    store.now += published_paths.VALID_S
    assert published_paths.published() == {}


def test_an_ingress_that_is_not_at_the_root_or_has_no_models_with_paths_tells_nothing(store: Store) -> None:
    PathPublisher("remote-vae").tell({**APPLICATIONS, "remote-vae": {"route_prefix": "/vae"}}, ["sd"])
    PathPublisher("remote-vae").tell(APPLICATIONS, ["flux"])
    assert not store.kept


def test_what_could_not_be_told_is_told_at_the_next_reading(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = PathPublisher("remote-vae")
    with monkeypatch.context() as away:
        away.setattr(store, "put", lambda *_, **__: 1 / 0)
        publisher.tell(APPLICATIONS, ["sd"])
    publisher.tell(APPLICATIONS, ["sd"])
    assert published_paths.published() == {"/sd": "sd"}
