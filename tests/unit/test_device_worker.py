"""The one thread of the device: what waits is grouped by shape, what is given up is dropped, nobody suffers for a neighbour."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from limits import WAIT_S
from remote_vae.errors import DeadlineExceeded
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from remote_vae_serve.replica.latency import LatencyEstimator


class Bench:
    """A device whose first job holds it until `go`, so that what comes after waits together."""

    def __init__(self) -> None:
        self.device = DeviceWorker(nullcontext)
        self.ran: list[torch.Tensor] = []
        self._go, self._busy = threading.Event(), threading.Event()
        self._held = Job(torch.zeros(1), self._hold, lambda part: part)
        self.device.submit(self._held)
        assert self._busy.wait(WAIT_S)

    def _hold(self, batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._busy.set()
        assert self._go.wait(WAIT_S)
        return batch, None

    def run(self, batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.ran.append(batch)
        return batch * 2, None

    def job(self, *values: float, group: Any = "a", limit: int = 8, **fields: Any) -> Job:
        job = Job(torch.tensor(values), fields.pop("run", self.run), fields.pop("finish", lambda part: part.tolist()),
                  batch_key=group, batch_limit=limit, **fields)  # fmt: skip
        self.device.submit(job)
        return job

    def go(self) -> None:
        self._go.set()
        self._held.done.result(WAIT_S)

    @property
    def batches(self) -> list[list[float]]:
        return [batch.tolist() for batch in self.ran]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.go()
    bench.device.close()


def made(job: Job) -> Any:
    return job.done.result(WAIT_S).output


def test_jobs_of_one_group_that_wait_run_as_one_batch_and_each_gets_its_part(bench: Bench) -> None:
    jobs = [bench.job(1), bench.job(2, 3), bench.job(4)]
    bench.go()
    assert [made(job) for job in jobs] == [[2], [4, 6], [8]]
    assert bench.batches == [[1, 2, 3, 4]]


def test_a_batch_is_no_larger_than_any_of_its_jobs_allows(bench: Bench) -> None:
    jobs = [bench.job(1, limit=4), bench.job(2, 3, limit=4), bench.job(4, 5, limit=4), bench.job(6, limit=4)]
    careful = bench.job(7, limit=2)
    bench.go()
    for job in (*jobs, careful):
        made(job)
    # The first takes what still fits behind it; what does not keeps its place in the line.
    assert bench.batches == [[1, 2, 3, 6], [4, 5], [7]]


def test_other_groups_and_jobs_without_one_keep_their_turn(bench: Bench) -> None:
    jobs = [bench.job(1), bench.job(2, group="b"), bench.job(3, group=None), bench.job(4), bench.job(5, group="b")]
    bench.go()
    for job in jobs:
        made(job)
    assert bench.batches == [[1, 4], [2, 5], [3]]


def test_a_lone_job_does_not_wait_for_company() -> None:
    device = DeviceWorker(nullcontext)
    taken = []
    for number in range(20):
        began = time.perf_counter()
        job = Job(torch.tensor([number]), lambda batch: (batch, None), lambda part: part, batch_key="a", batch_limit=8)
        device.submit(job)
        job.done.result(WAIT_S)
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.05  # a wait would be one of each
    device.close()


def test_in_a_pause_it_rests_once_and_work_is_done_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_vae_serve.replica.device_worker.PAUSE_S", 0.05)
    rests: list[str] = []
    device = DeviceWorker(nullcontext, lambda: rests.append(threading.current_thread().name))
    for _ in range(2):
        job = Job(torch.tensor([1]), lambda batch: (batch * 2, None), lambda part: part)
        device.submit(job)
        assert job.done.result(WAIT_S).output.item() == 2
        had = len(rests)
        time.sleep(0.3)
        assert rests[had:] == ["device"]
    device.close()


def test_what_was_cancelled_or_given_up_never_runs_and_the_others_do(bench: Bench) -> None:
    left, cancelled = bench.job(1), bench.job(2)
    late = bench.job(3, give_up=time.perf_counter() - 1)
    in_time = bench.job(4, give_up=time.perf_counter() + WAIT_S)
    assert cancelled.done.cancel()
    bench.go()
    assert (made(left), made(in_time)) == ([2], [8])
    with pytest.raises(DeadlineExceeded, match="waited for the model longer"):
        made(late)
    assert bench.batches == [[1, 4]]


def test_what_fails_in_a_batch_runs_alone_and_fails_alone(bench: Bench) -> None:
    def run(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        bench.ran.append(batch)
        if 2.0 in batch.tolist():
            raise RuntimeError("two")
        return batch * 2, None

    jobs = [bench.job(value, run=run) for value in (1, 2, 3)]
    bench.go()
    assert [made(job) for job in jobs[::2]] == [[2], [6]]
    with pytest.raises(RuntimeError, match="two"):
        made(jobs[1])
    assert bench.batches == [[1, 2, 3], [1], [2], [3]]


def test_a_batch_of_several_jobs_may_be_run_otherwise_and_where_that_fails_each_is_run_as_ever(bench: Bench) -> None:
    tried: list[list[float]] = []

    def together(batch: torch.Tensor) -> tuple[torch.Tensor, str]:
        tried.append(batch.tolist())
        if 2.0 in batch.tolist():
            raise RuntimeError("not together")
        return batch * 10, "together"

    fields = {"run_together": together}
    fine = [bench.job(value, **fields) for value in (1, 3)]
    mixed = [bench.job(value, group="b", **fields) for value in (2, 4)]
    alone = bench.job(5, group="c", **fields)
    bench.go()
    assert [made(job) for job in (*fine, *mixed, alone)] == [[10], [30], [4], [8], [10]]
    assert (tried, bench.batches) == ([[1, 3], [2, 4]], [[2], [4], [5]])
    notes = [job.done.result(WAIT_S).note for job in (*fine, *mixed, alone)]
    assert notes == ["together", "together", None, None, None]


def test_an_output_that_cannot_leave_fails_its_own_job_only(bench: Bench) -> None:
    def no(part: torch.Tensor) -> None:
        raise ValueError("no")

    bad, good = bench.job(1, finish=no), bench.job(2)
    bench.go()
    assert made(good) == [4]
    with pytest.raises(ValueError, match="no"):
        made(bad)


def test_a_closed_device_cancels_what_waits() -> None:
    bench = Bench()
    job = bench.job(1)
    bench.device.close()
    bench.go()
    assert job.done.cancelled()
    assert bench.batches == []


def test_it_says_how_long_a_newcomer_would_wait_once_it_knows_its_latency(bench: Bench) -> None:
    latency = LatencyEstimator()
    assert bench.device.wait_s() == 0.0
    latency.learn(1, 2.0)
    bench.job(1, 2, 3, latency=latency)
    assert bench.device.wait_s() == pytest.approx(6.0)


def test_nobody_waits_for_those_who_have_left(bench: Bench) -> None:
    """They are taken out of the queue when their turn comes, and cost nothing then."""
    latency = LatencyEstimator()
    latency.learn(1, 2.0)
    cancelled = bench.job(1, latency=latency, group=None)
    bench.job(2, latency=latency, group=None, give_up=time.perf_counter() - 1)
    bench.job(3, latency=latency, group=None, give_up=time.perf_counter() + WAIT_S)
    cancelled.done.cancel()
    assert bench.device.wait_s() == pytest.approx(2.0)


def test_what_it_will_wait_at_least_is_by_the_fastest_that_was_measured(bench: Bench) -> None:
    """One slow decode, the first one, says little of those that come."""
    latency = LatencyEstimator()
    for seconds in (100.0, 1.0, 2.0):
        latency.learn(10, seconds)
    bench.job(*range(20), latency=latency, group=None)
    assert bench.device.least_wait_s() == pytest.approx(2.0)
    assert bench.device.wait_s() > 50


def test_an_estimate_of_latency_follows_what_is_measured() -> None:
    latency = LatencyEstimator()
    assert latency.predict(10) == 0
    latency.learn(10, 1.0)
    assert latency.predict(20) == pytest.approx(2.0)
    for _ in range(20):
        latency.learn(10, 3.0)
    assert latency.predict(10) == pytest.approx(3.0, rel=0.01)
