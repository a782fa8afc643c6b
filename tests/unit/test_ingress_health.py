"""Health checks of the ingress: whether it still hears of the models."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from remote_vae.errors import InternalError
from remote_vae_serve.ingress import ingress, model_registry
from remote_vae_serve.ingress.model_registry import CHECKS_WITHOUT_NEWS, ModelRegistry
from sick import WAIT_S


class Reading(ModelRegistry):
    """Of a Serve that answers, fails or keeps silent, as it is told."""

    def __init__(self) -> None:
        self.answer: Callable[[], None] = lambda: None
        self.reads = 0
        super().__init__()

    def refresh(self) -> None:
        self.reads += 1
        self.answer()
        self._news += 1


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def ends() -> None:
    """As the thread does that reads."""
    raise SystemExit


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    monkeypatch.setattr(model_registry, "REFRESH_S", 0.01)
    registry = Reading()
    yield registry
    registry.answer = ends
    registry._thread.join(WAIT_S)
    assert not registry._thread.is_alive()


def read(registry: Reading, times: int = 1, patience_s: float = WAIT_S) -> None:
    """Wait until it has begun to read so often; no longer where it never will."""
    had, give_up = registry.reads, time.monotonic() + patience_s
    while registry.reads < had + times and registry._thread.is_alive() and time.monotonic() < give_up:
        time.sleep(0.005)


def checks(registry: Reading, count: int, patience_s: float = WAIT_S) -> list[str | None]:
    """Of a Serve that checks as often as the registry could have read."""
    found = []
    for _ in range(count):
        read(registry, 2, patience_s)
        found.append(registry.fault())
    return found


def test_an_ingress_is_well_as_long_as_it_hears_of_the_models(registry: Reading) -> None:
    assert checks(registry, 2 * CHECKS_WITHOUT_NEWS) == [None] * 2 * CHECKS_WITHOUT_NEWS


def test_an_ingress_whose_thread_has_ended_is_replaced(registry: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.answer = ends
    registry._thread.join(WAIT_S)
    one = ingress.Ingress.__new__(ingress.Ingress)
    one._registry = registry
    with pytest.raises(RuntimeError, match="thread that reads Serve's state has ended"):
        asyncio.run(one.check_health())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_an_ingress_that_hears_nothing_of_a_serve_that_checks_it_is_replaced(registry: Reading, how: str) -> None:
    go = threading.Event()

    def fail() -> None:
        raise InternalError("no")

    registry.answer = fail if how == "fails" else lambda: go.wait(WAIT_S) or None  # type: ignore[func-returns-value]
    read(registry)  # the one before has ended
    registry.fault()
    found = checks(registry, CHECKS_WITHOUT_NEWS, 0.02 if how == "hangs" else WAIT_S)
    assert found[:-1] == [None] * (CHECKS_WITHOUT_NEWS - 1)
    assert "nothing was read" in (found[-1] or "")
    registry.answer = lambda: None
    go.set()
    read(registry, 2)
    assert registry.fault() is None


def test_a_controller_that_is_away_for_long_is_nothing_against_the_ingress(registry: Reading) -> None:
    """While it is away it checks nobody."""

    def fail() -> None:
        raise InternalError("no controller")

    for _ in range(5):
        registry.answer = fail
        time.sleep(0.2)
        assert checks(registry, 2) == [None, None]  # it is back, and its state is yet to be read
        registry.answer = lambda: None
        assert checks(registry, 2) == [None, None]
