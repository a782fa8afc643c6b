"""The device's thread survives whatever a job does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from remote_vae_serve.replica import device_worker
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from remote_vae_serve.replica.latency import LatencyEstimator
from sick import WAIT_S, job, worked


class Odd(LatencyEstimator):
    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self.fail)

    def fail(self, *arguments: object) -> Any:
        raise ZeroDivisionError


class Incomparable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError


ODD: dict[str, Callable[[], Job]] = {
    "a give_up that is no number": lambda: job(give_up="soon"),
    "a latency that learns nothing": lambda: job(latency=Odd("learn")),
    "a latency that predicts nothing": lambda: job(latency=Odd("predict")),
    "an output that is no pair": lambda: job(lambda batch: 7),
    "a run that exits": lambda: job(lambda batch: exec("raise SystemExit")),
    "a finish that exits": lambda: job(finish=lambda part: exec("raise SystemExit")),
    "a group that compares with nothing": lambda: job(batch_key=Incomparable(), batch_limit=8),
    "a limit that is no number": lambda: job(batch_key="a", batch_limit=None),
}


@pytest.mark.parametrize("name", ODD)
def test_whatever_a_job_does_the_next_ones_run(name: str) -> None:
    worker, go = DeviceWorker(nullcontext), threading.Event()

    def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert go.wait(WAIT_S)
        return batch, None

    odd = [ODD[name](), ODD[name]()]
    normal = job(batch_key="a", batch_limit=8)
    for one in (job(hold), *odd, normal):
        worker.submit(one)
    go.set()
    for one in odd:  # answered, whatever the answer is
        one.done.exception(WAIT_S)
    assert normal.done.result(WAIT_S).output.shape == (1,)
    assert worked(worker)
    assert worker.fault is None
    worker.close()


def test_a_pause_that_fails_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_worker, "PAUSE_S", 0.05)
    rested = threading.Event()

    def rest() -> None:
        rested.set()
        raise ZeroDivisionError

    worker = DeviceWorker(nullcontext, rest)
    assert rested.wait(WAIT_S)
    assert worked(worker)
    assert worker.fault is None
    worker.close()
