"""The probe at the start: what it takes for our middleware, and what an operator is told who would serve without it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from local_server import free_port
from remote_vae.ray_internals import HTTPTarget
from remote_vae_serve import proxy
from remote_vae_serve.launcher import server, startup_probe
from remote_vae_serve.launcher.startup_probe import MiddlewareMissing, Probe, refusal
from remote_vae_serve.middleware import settings
from served import served


async def serves(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve answers by itself."""
    await PlainTextResponse("{}")(scope, receive, send)


@pytest.fixture(params=[None, "one,two"], ids=["no tokens", "tokens"])
def tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    if request.param is None:
        monkeypatch.delenv(settings.TOKENS, raising=False)
    else:
        monkeypatch.setenv(settings.TOKENS, request.param)
    return request.param


def protected() -> ASGIApp:
    app: ASGIApp = serves
    for layer in proxy.middlewares():
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


def target(url: str) -> HTTPTarget:
    parts = urlsplit(url)
    return HTTPTarget(str(parts.hostname), int(parts.port or 0), "SERVE_PROXY")


def answering(monkeypatch: pytest.MonkeyPatch, *targets: HTTPTarget) -> None:
    monkeypatch.setattr(startup_probe, "http_targets", lambda: list(targets))


def test_middleware_that_is_there_is_seen_once(
    tokens: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(protected()) as url:
        answering(monkeypatch, target(url))
        probe = Probe("0.0.0.0", False, bool(tokens))
        assert [probe.ask(), probe.ask()] == [True, True]
    assert capfd.readouterr().out.count(f"in place: SERVE_PROXY, {url.removeprefix('http://')}") == 1


def test_a_process_without_it_is_named(tokens: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(serves) as url:
        answering(monkeypatch, target(url))
        with pytest.raises(MiddlewareMissing, match=f"SERVE_PROXY at {url.removeprefix('http://')} answers without"):
            Probe("127.0.0.1", False, bool(tokens)).ask()


def test_a_node_that_has_the_middleware_and_lacks_the_tokens_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.TOKENS, raising=False)
    with served(protected()) as url:
        answering(monkeypatch, target(url))
        with pytest.raises(MiddlewareMissing):
            Probe("127.0.0.1", False, has_tokens=True).ask()


def test_a_process_that_does_not_listen_yet_is_waited_for_and_one_that_went_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = HTTPTarget("127.0.0.1", free_port(), "SERVE_REPLICA")
    probe = Probe("127.0.0.1", False, has_tokens=True)
    answering(monkeypatch, silent)
    assert not probe.ask()
    monkeypatch.setattr(startup_probe, "PATIENCE_S", -1)
    with pytest.raises(MiddlewareMissing, match=r"SERVE_REPLICA .* cannot be asked"):
        probe.ask()
    answering(monkeypatch)
    assert probe.ask()


def test_somebody_else_at_the_port_is_no_refusal_of_ours() -> None:
    with served(PlainTextResponse("no", status_code=401)) as url:
        assert refusal("127.0.0.1", target(url).port) == ""
    with pytest.raises(OSError, match="refused"):
        refusal("127.0.0.1", free_port())


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """What `main` did with Serve, which does not start here; one process without the middleware is there."""
    done: list[str] = []
    monkeypatch.setattr(server, "start_serve", lambda *_: done.append("started"))
    monkeypatch.setattr(server, "serve_run", lambda *_: done.append("deployed"))
    monkeypatch.setattr(server, "INTERVAL_S", 0)
    monkeypatch.setattr("ray.shutdown", lambda: done.append("ray ended"))
    monkeypatch.setattr("ray.serve.shutdown", lambda: done.append("serve ended"))
    (tmp_path / "c.yaml").write_text("applications: []")
    monkeypatch.chdir(tmp_path)
    return done


@pytest.mark.parametrize("changed", [False, True])
def test_with_tokens_nothing_is_deployed_and_the_sentence_says_what_to_do(
    changed: bool, begun: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(settings.TOKENS, "one")
    with served(serves) as url:
        answering(monkeypatch, target(url))
        if changed:
            monkeypatch.setattr(startup_probe, "http_targets", lambda: begun.no_such_attribute)  # type: ignore[attr-defined]
        with pytest.raises(SystemExit) as ended:
            server.main("local", "c.yaml", 0)
    assert (ended.value.code, begun) == (1, ["started", "ray ended"])
    said = capsys.readouterr().err
    for words in ("REMOTE_VAE_TOKENS would not be enforced", "nothing is served", "RAY_SERVE_", "install the ray"):
        assert words in said
    assert ("cannot be found out" in said) == changed


def test_nothing_is_deployed_before_the_first_proxy_is_there_and_was_asked(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine Serve has said that it runs, and has no proxy yet."""
    monkeypatch.setenv(settings.TOKENS, "one")
    with served(protected()) as url:
        answers = iter([[], [], [target(url)], [HTTPTarget("127.0.0.1", free_port(), "SERVE_REPLICA")]])

        def asked() -> list[HTTPTarget]:
            begun.append("asked")
            return next(answers)

        monkeypatch.setattr(startup_probe, "http_targets", asked)
        monkeypatch.setattr(startup_probe, "PATIENCE_S", -1)
        with pytest.raises(SystemExit):
            server.main("local", "c.yaml", 0)
    assert begun == ["started", "asked", "asked", "asked", "deployed", "asked", "ray ended"]


def test_where_nobody_ever_answers_http_nothing_is_served_with_tokens(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.TOKENS, "one")
    answering(monkeypatch)
    monkeypatch.setattr(startup_probe, "FIRST_PROXY_S", -1)
    with pytest.raises(SystemExit):
        server.main("local", "c.yaml", 0)
    assert "deployed" not in begun


def test_a_replica_that_comes_later_ends_what_was_deployed(begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.TOKENS, "one")
    with served(serves) as bare, served(protected()) as url:
        later = [target(url), target(bare)]
        monkeypatch.setattr(startup_probe, "http_targets", lambda: later if "deployed" in begun else later[:1])
        with pytest.raises(SystemExit, match="1"):
            server.main("auto", "c.yaml", 0)
    assert begun == ["started", "deployed", "serve ended"]


def test_without_tokens_it_is_said_and_served_all_the_same(
    begun: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(settings.TOKENS, raising=False)

    def sleep(_: float) -> None:
        raise KeyboardInterrupt

    with served(serves) as url:
        answering(monkeypatch, target(url))
        monkeypatch.setattr(server, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
        server.main("local", "c.yaml", 0)
    assert begun == ["started", "deployed", "serve ended"]
    assert "over the limit are read before they are refused" in capsys.readouterr().err


def test_an_app_checks_tokens_itself_and_stays_what_it_is(tokens: str | None) -> None:
    for app in (Starlette(routes=[Route("/", serves)]), serves):
        guarded = proxy.guarded(app)
        assert isinstance(guarded, Starlette) == isinstance(app, Starlette)
        with served(guarded) as url:
            assert refusal("127.0.0.1", target(url).port) == ("unauthorized" if tokens else "")
