"""`Device`: the one thread that an engine's work runs on, and the queue before it. What waits is grouped there: decodes of one
shape run as one batch, with no timer: a lone request never waits for company."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from remote_vae.errors import DeadlineExceeded, RemoteVAEError
from remote_vae_serve.pace import Pace

logger = logging.getLogger("ray.serve")

PAUSE_S = 30.0
"""Longer than a picture takes to be made: who makes one after the other finds the device as it left it."""

Run = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
"""Work on a batch, sample by sample independent but for the last place of a float; and a note on how it was done."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request's turn on the device.

    Attributes:
        batch: what goes in, `[B, ...]`, on the host.
        run: what to do with it.
        run_together: what to do with a batch of several jobs, where it is something else.
        finish: what leaves the device of its own part of the output, given the note; runs there.
        pace: how long such work takes.
        group: jobs of equal groups may run as one batch; None runs alone.
        limit: largest batch it may be part of.
        give_up: moment on `time.perf_counter` after which nobody waits for it.
        done: what `finish` gave, when it began and when it ended; cancelled, the job is dropped where it waits.
    """

    batch: torch.Tensor
    run: Run
    finish: Callable[[torch.Tensor, Any], Any]
    pace: Pace = field(default_factory=Pace)
    group: Hashable = None
    limit: int = 1
    give_up: float | None = None
    run_together: Run | None = None
    done: Future[tuple[Any, float, float]] = field(default_factory=Future)


class Device:
    """Runs jobs one after the other, in the order they came, and what groups with them.

    Args:
        enter: entered once by the thread: the stream its work goes to.
        rest: called by the thread in a pause, once.
    """

    def __init__(
        self, enter: Callable[[], AbstractContextManager[object]], rest: Callable[[], None] = lambda: None
    ) -> None:
        self._enter, self._rest = enter, rest
        self._waiting: deque[Job] = deque()
        self._running: tuple[float, float] | None = None  # since when, and for how long as far as can be told
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def wait_s(self) -> float:
        """Seconds until a job that came now would begin, as far as can be told."""
        with self._changed:
            waiting = sum(job.pace.predict(job.batch.numel()) for job in self._waiting)
            running = self._running
        if running is None:
            return waiting
        began, predicted = running
        return waiting + max(0.0, began + predicted - time.perf_counter())

    def close(self) -> None:
        """Cancel what waits; what runs ends."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().done.cancel()
            self._changed.notify()

    def _work(self) -> None:
        with self._enter(), torch.inference_mode():
            while group := self._next():
                self._run(group)
                self._running = None
                del group  # or an idle device would hold the last request's latents and pixels

    def _next(self) -> list[Job]:
        """The first job that is still wanted and those that may run with it; empty when closed."""
        pause: float | None = PAUSE_S
        while True:
            with self._changed:
                is_pause = not self._changed.wait_for(lambda: self._waiting or self._closed, pause)
                while self._waiting:
                    first = self._waiting.popleft()
                    if _starts(first):
                        return [first, *self._company_of(first)]
                if self._closed:
                    return []
            if is_pause:  # not under the lock: who submits work never waits for this
                self._rest()
                pause = None

    def _company_of(self, first: Job) -> list[Job]:
        company: list[Job] = []
        size, limit = len(first.batch), first.limit
        if first.group is None or size >= limit:
            return company
        left: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            fits = job.group == first.group and size + len(job.batch) <= min(limit, job.limit)
            if not fits:
                left.append(job)
            elif _starts(job):
                company.append(job)
                size, limit = size + len(job.batch), min(limit, job.limit)
        self._waiting = left
        return company

    def _run(self, group: Sequence[Job]) -> None:
        began = time.perf_counter()
        values = sum(job.batch.numel() for job in group)
        self._running = began, group[0].pace.predict(values)
        try:
            batch = torch.cat([job.batch for job in group]) if len(group) > 1 else group[0].batch
            run = group[0].run if len(group) == 1 else group[0].run_together or group[0].run
            output, note = run(batch)
            parts = torch.split(output, [len(job.batch) for job in group]) if len(group) > 1 else (output,)
        except BaseException as error:
            if len(group) == 1:
                group[0].done.set_exception(_without_tensors(error))
                return
            if not isinstance(error, RemoteVAEError):
                logger.warning(
                    "a batch of %d failed (%s); its members run one by one", len(group), type(error).__name__
                )
        else:
            group[0].pace.learn(values, time.perf_counter() - began)
            for job, part in zip(group, parts, strict=True):
                try:
                    job.done.set_result((job.finish(part, note), began, time.perf_counter()))
                except BaseException as error:
                    job.done.set_exception(_without_tensors(error))
            return
        # Only here is the error gone, and with it what the batch had on the device: it may have been out of memory.
        for job in group:
            self._run([job])


def _without_tensors(error: BaseException) -> BaseException:
    """The error with its traceback as text: one of frames keeps their tensors on the device, and the job, which keeps the error,
    until the garbage collector comes round."""
    if not isinstance(error, RemoteVAEError):
        error.__cause__ = _Traceback("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    else:
        error.__cause__ = None
    error.__context__ = None
    return error.with_traceback(None)


class _Traceback(Exception):
    """Where an error was raised, for a log that shows causes."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _starts(job: Job) -> bool:
    """Mark the job as running; False where it was cancelled, or its client has given up."""
    if not job.done.set_running_or_notify_cancel():
        return False
    if job.give_up is not None and time.perf_counter() > job.give_up:
        job.done.set_exception(DeadlineExceeded("The request waited for the model longer than its client waits for it"))
        return False
    return True
