"""`DeviceWorker`: the one thread that decodes and encodes run on, and the queue before it, with dynamic batching: decodes of one
shape that wait together run as one batch. There is no timer: a lone request never waits for others. What nobody waits for any
more is not begun, and what runs is stopped at its next tile."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, starmap
from typing import Any

import torch

from remote_vae.errors import BadRequest, DeadlineExceeded, RemoteVAEError
from remote_vae_serve.engine.abandonment import Abandoned
from remote_vae_serve.replica.device_job import Done, Job, without_tensors
from remote_vae_serve.replica.health import being_replaced
from remote_vae_serve.replica.latency import LatencyEstimator

logger = logging.getLogger("ray.serve")

PAUSE_S = 30.0
"""Longer than a picture takes to be made: who makes one after the other finds the device as it left it."""

ENDED = "the device's thread has ended"
TOO_LATE = "The model took longer than the request's client waits for it"


class FairQueue:
    """The jobs that wait, in turns among clients (round robin): one with two hundred requests is asked as often as one with one.
    For each client it is first in, first out. Not thread-safe."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()  # whose turn is next comes first
        self._latest = ""  # who had the turn before

    def append(self, job: Job) -> None:
        if job.client not in self._of:
            self._of[job.client] = deque()
            if self._latest in self._of:
                # Before its next: it has just had a turn. Else who has one request at a time gets every third turn beside it.
                self._of.move_to_end(self._latest)
        self._of[job.client].append(job)

    def popleft(self) -> Job:
        """The job whose turn it is; its client's next turn comes after all others'. Raises IndexError where none waits."""
        if not self._of:
            raise IndexError("nothing waits")
        client, jobs = next(iter(self._of.items()))
        job = jobs.popleft()
        self._latest = client
        if jobs:
            self._of.move_to_end(client)
        else:
            del self._of[client]
        return job

    def remove(self, job: Job) -> None:
        """Take out one that waits, in whoever's turn. Raises ValueError where it does not."""
        jobs = self._of.get(job.client, deque())
        jobs.remove(job)
        if not jobs:
            del self._of[job.client]

    def before(self, client: str) -> Iterator[Job]:
        """Those that have their turn before a job which that client sent now; not in their order."""
        own = len(self._of.get(client, ()))
        rounds = own + 1  # of those whose turn comes before the client's
        for name, jobs in self._of.items():
            if name == client or (own == 0 and name == self._latest):
                rounds = own
            yield from islice(jobs, rounds)

    def __iter__(self) -> Iterator[Job]:
        """All that wait, in the order of their turns."""
        queues = [iter(tuple(jobs)) for jobs in self._of.values()]
        while queues:
            left = []
            for jobs in queues:
                for job in jobs:
                    yield job
                    left.append(jobs)
                    break
            queues = left

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))


class DeviceWorker:
    """Runs jobs one after the other, clients in turns, and in one batch with them what may. What a job does ends nobody
    else's: only when the device is of no use any more does the thread end, and what waits for it is told so.

    Args:
        enter: entered once by the thread: the stream its work goes to.
        on_idle: called by the thread in a pause, once.
        probe: says why the device is of no use, or None; called by the thread in a pause, and after a job that failed for no
            known reason, before that is answered.
        unless: entered around each run, with a function that says whether anybody waits for it: `Abandonment.unless`.
    """

    def __init__(
        self,
        enter: Callable[[], AbstractContextManager[object]],
        on_idle: Callable[[], None] = lambda: None,
        probe: Callable[[], str | None] = lambda: None,
        unless: Callable[[Callable[[], bool]], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._enter, self._on_idle, self._probe, self._unless = enter, on_idle, probe, unless
        self._fault: str | None = None
        self._waiting = FairQueue()
        self._taken: list[Job] = []  # those that run
        self._running: float | None = None  # since when
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    async def run(self, job: Job) -> Done:
        """Submit a job and wait for it; cancelled (its client left), it never runs, or stops. Raises what the work does."""
        self.submit(job)
        try:
            return await asyncio.wrap_future(job.done)
        finally:
            job.left.set()  # a future that runs cannot be cancelled

    def submit(self, job: Job) -> None:
        """Queue a job; its future has the result, or the error of a worker that has ended."""
        with self._changed:
            if self.fault is None:
                self._waiting.append(job)
                self._changed.notify()
                return
        job.done.set_exception(being_replaced())

    @property
    def fault(self) -> str | None:
        """Why nothing runs here any more; None while it does."""
        if self._fault is None and not self._thread.is_alive():
            return ENDED
        return self._fault

    def wait_s(self, client: str = "") -> float:
        """Seconds until a job that the client sent now would begin, as far as can be told; infinite where it never would."""
        return self._wait_s(client, LatencyEstimator.predict)

    def least_wait_s(self, client: str = "") -> float:
        """The same, were all that comes before done as fast as anything like it ever was: it will hardly begin sooner."""
        return self._wait_s(client, LatencyEstimator.least)

    def _wait_s(self, client: str, take: Callable[[LatencyEstimator, int], float]) -> float:
        with self._changed:
            if self.fault is not None:
                return math.inf
            before = [job for job in self._waiting.before(client) if _is_wanted(job)]
            taken, running = list(self._taken), self._running
        seconds = sum(take(job.latency, job.batch.numel()) for job in before)
        if running is None or not taken:
            return seconds
        lasts = take(taken[0].latency, sum(job.batch.numel() for job in taken))
        return seconds + max(0.0, running + lasts - time.perf_counter())

    def close(self) -> None:
        """Cancel what waits; what runs ends."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().done.cancel()
            self._changed.notify()

    def _work(self) -> None:
        try:
            with self._enter(), torch.inference_mode():
                while self._next():
                    self._run_guarded(self._taken)
                    self._running = None
                    self._taken = []  # or an idle device would hold the last request's latents and pixels
        except BaseException:
            logger.exception("the device's thread ends")
        finally:
            self._end()

    def _run_guarded(self, jobs: Sequence[Job]) -> None:
        """Run them; whatever else fails, fails these jobs and not the thread."""
        try:
            self._run(jobs)
        except BaseException as error:
            logger.exception("a job failed outside of its own work")
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(without_tensors(error))

    def _end(self) -> None:
        """Nothing will run any more: who waits is told so."""
        with self._changed:
            self._fault = self._fault or ENDED
            left, self._taken, self._waiting = [*self._taken, *self._waiting], [], FairQueue()
        for job in left:
            if not job.done.done() and (job.done.running() or job.done.set_running_or_notify_cancel()):
                job.done.set_exception(being_replaced())

    def _next(self) -> bool:
        """Take the first job that is still wanted and those that may run with it; False when closed, or of no use."""
        pause: float | None = PAUSE_S
        while self._fault is None:
            with self._changed:
                is_pause = not self._changed.wait_for(lambda: self._waiting or self._closed, pause)
                while self._waiting:
                    self._taken = [self._waiting.popleft()]
                    if _starts(self._taken[0]):
                        self._take_with(self._taken[0])
                        return True
                    self._taken = []
                if self._closed:
                    return False
            if is_pause:  # not under the lock: who submits work never waits for this
                self._rest()
                pause = None
        return False

    def _rest(self) -> None:
        if (fault := self._probe()) is not None:
            logger.error("the device is of no use any more: %s", fault)
            self._fault = fault
        try:
            self._on_idle()
        except Exception:
            logger.exception("in a pause the device could not be tidied")

    def _take_with(self, first: Job) -> None:
        """Take the jobs that wait and may run as one batch with the first."""
        if first.batch_key is None:
            return
        size, limit = len(first.batch), first.batch_limit
        for job in tuple(self._waiting):
            if not _fits(job, first, size, limit):
                continue
            self._waiting.remove(job)
            if _starts(job):
                self._taken.append(job)
                size, limit = size + len(job.batch), min(limit, job.batch_limit)

    def _run(self, jobs: Sequence[Job]) -> None:
        if self._fault is not None:  # found by another of their batch
            for job in jobs:
                job.done.set_exception(being_replaced())
            return
        began = time.perf_counter()
        first, values = jobs[0], sum(job.batch.numel() for job in jobs)
        self._running = began
        clients = [(job.left, job.give_up) for job in jobs]
        try:
            with self._unless(lambda: any(starmap(_waits, clients))):
                if len(jobs) == 1:
                    output, note = first.run(first.batch)
                    parts: Sequence[torch.Tensor] = (output,)
                else:
                    output, note = (first.run_together or first.run)(torch.cat([job.batch for job in jobs]))
                    parts = torch.split(output, [len(job.batch) for job in jobs])
        except BaseException as raised:
            error = without_tensors(raised)
        else:
            first.latency.learn(values, time.perf_counter() - began)
            for job, part in zip(jobs, parts, strict=True):
                self._finish(job, part, note, began)
            return
        # Only here are the error's frames gone, and with them what the batch had on the device: it may have been out of memory.
        if isinstance(error, Abandoned):
            for job in jobs:
                job.done.set_exception(DeadlineExceeded(TOO_LATE))  # read by those who are there, and late
            return
        if len(jobs) == 1:
            first.done.set_exception(self._judged(error))
            return
        if not isinstance(error, RemoteVAEError):
            logger.warning("a batch of %d failed (%s); its members run one by one", len(jobs), type(error).__name__)
        for job in jobs:
            self._run([job])

    def _finish(self, job: Job, part: torch.Tensor, note: Any, began: float) -> None:
        try:
            done = Done(job.finish(part), note, began, time.perf_counter())
        except BaseException as raised:
            error = without_tensors(raised)
        else:
            job.done.set_result(done)
            return
        job.done.set_exception(self._judged(error))

    def _judged(self, error: BaseException) -> BaseException:
        """The error of a job, unless the device is to blame for it: a request's own fault is nothing against a replica."""
        # A BadRequest from the device says that these latents make NaN: so does every latent where the weights are spoilt.
        if self._fault is None and (isinstance(error, BadRequest) or not isinstance(error, RemoteVAEError)):
            self._fault = self._probe()
        if self._fault is None:
            return error
        logger.error("the device is of no use any more: %s", self._fault, exc_info=error)
        return being_replaced()


def _starts(job: Job) -> bool:
    """Mark the job as running; False where it was cancelled, or its client has given up, or nobody can tell."""
    if not job.done.set_running_or_notify_cancel():
        return False
    try:
        if job.give_up is None or time.perf_counter() <= job.give_up:
            return True
        error: Exception = DeadlineExceeded("The request waited for the model longer than its client waits for it")
    except Exception as raised:
        error = raised
    job.done.set_exception(error)
    return False


def _is_wanted(job: Job) -> bool:
    """Whether somebody still waits for it; who has left is only taken out of the queue when its turn comes."""
    try:
        return not job.done.cancelled() and _waits(job.left, job.give_up)
    except Exception:  # nobody can tell; its turn will
        return False


def _waits(left: threading.Event, give_up: float | None) -> bool:
    return not left.is_set() and (give_up is None or time.perf_counter() <= give_up)


def _fits(job: Job, first: Job, size: int, limit: int) -> bool:
    """Whether the job may join a batch of that size; one that cannot be told apart from the others runs alone."""
    try:
        return size + len(job.batch) <= min(limit, job.batch_limit) and bool(job.batch_key == first.batch_key)
    except Exception:
        return False
