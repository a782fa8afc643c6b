"""`Job`: one request's turn on the device, and what comes of it: `Done`, or an error without tensors."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from remote_vae.errors import RemoteVAEError
from remote_vae_serve.replica.latency import LatencyEstimator

Run = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
"""Work on a batch, sample by sample independent but for the last place of a float; and a note on how it was done."""


@dataclass(frozen=True, eq=False)
class Done:
    """Result of a job, and when it ran.

    Attributes:
        output: what its `finish` gave.
        note: of its `run`.
        began, ended: on `time.perf_counter`.
    """

    output: Any
    note: Any
    began: float
    ended: float


@dataclass(frozen=True, eq=False)
class Job:
    """One request's turn on the device.

    Attributes:
        batch: what goes in, `[B, ...]`, on the host.
        run: what to do with it.
        finish: what leaves the device of its own part of the output; runs there.
        latency: how long such work takes.
        run_together: what to do with a batch of several jobs, where it is something else.
        batch_key: jobs of equal keys may run as one batch; None runs alone.
        batch_limit: largest batch it may be part of.
        give_up: moment on `time.perf_counter` after which nobody waits for it.
        client: whose it is; those of several clients take turns.
        done: cancelled, the job is dropped where it waits.
        left: set once nobody waits for it any more, whether it waits or runs.
    """

    batch: torch.Tensor
    run: Run
    finish: Callable[[torch.Tensor], Any]
    latency: LatencyEstimator = field(default_factory=LatencyEstimator)
    run_together: Run | None = None
    batch_key: Hashable = None
    batch_limit: int = 1
    give_up: float | None = None
    client: str = ""
    done: Future[Done] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)


def without_tensors(error: BaseException) -> BaseException:
    """The error with its traceback as text: one of frames keeps their tensors on the device, and the job, which keeps the error,
    until the garbage collector comes round."""
    if not isinstance(error, Exception):  # who waits is an event loop, and would end with it
        return without_tensors(RuntimeError(f"a job raised {type(error).__name__}").with_traceback(error.__traceback__))
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
