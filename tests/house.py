"""A model behind a real HTTP server in this process, and what a guest with bad manners may leave behind in it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch

from in_process import InProcess
from limits import WAIT_S
from raw_http import Answer, connect, exchange
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.config import FakeEngineConfig
from remote_vae_serve.engine.base import Decoded, Engine
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.engine.tiling import TilingPlan
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.http import bodies as http_bodies
from remote_vae_serve.http.app import MAX_BODIES, create_app, create_model_app
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.pipeline import Pipeline
from served import served

MAX_BODY = 2**26


class Body(bytearray):
    """One that a weak reference can be held of."""


DOORS = ("ingress", "direct")


class House:
    """The server's insides, watched.

    Attributes:
        pipeline: of the model.
        jobs, futures: of all requests that reached the device; the jobs weakly.
    """

    def __init__(self, engine: Engine, temporary: Path) -> None:
        self.pipeline = Pipeline(engine, "model")
        self.url = self.path = ""
        self.jobs: list[weakref.ref[Job]] = []
        self.futures: list[Future[Any]] = []
        self.bodies: list[weakref.ref[Body]] = []
        self._temporary = temporary
        self._loop: asyncio.AbstractEventLoop | None = None
        self._device = self.pipeline._worker
        self._submit = self._device.submit
        self._device.submit = self._watch  # type: ignore[method-assign]
        self._tasks = 0
        self._others = set(children())  # of the tests before, a Ray among them

    def _watch(self, job: Job) -> None:
        self._loop = asyncio.get_running_loop()
        self.jobs.append(weakref.ref(job))
        self.futures.append(job.done)
        self._submit(job)

    def new_body(self) -> Body:
        """What the server reads a body into."""
        body = Body()
        self.bodies.append(weakref.ref(body))
        return body

    @property
    def waiting(self) -> int:
        return len(self._device._waiting)

    def warm_up(self, z: torch.Tensor | None, output: Output) -> None:
        """Serve once: every import is done, and the server has as many tasks as when nobody is there. Where its deadline is
        short, the imports may take longer than that."""
        self._first = z, output
        give_up = time.monotonic() + WAIT_S
        while (status := self.serve(z, output).status) != 200:
            assert status == 504, status
            assert time.monotonic() < give_up
        time.sleep(0.1)
        self._tasks = self._running_tasks()

    def serve(self, z: torch.Tensor | None = None, output: Output = Output.JPEG, **headers: str) -> Answer:
        return exchange(self.url, post(z, output, self.path, **headers), timeout_s=WAIT_S)

    def _running_tasks(self) -> int:
        assert self._loop is not None
        return len(asyncio.all_tasks(self._loop))

    def leftovers(self) -> list[str]:
        """What is there that an idle server does not have."""
        pools = (self.pipeline._unpackers, self.pipeline._writers)
        found = {
            "jobs that wait": self.waiting,
            "a job that runs": self._device._running is not None,
            "work for the pools": sum(pool._work_queue.qsize() for pool in pools),
            "futures": sum(not future.done() for future in self.futures),
            "bodies": sum(body() is not None for body in self.bodies),
            "jobs, and with them latents and pixels": sum(job() is not None for job in self.jobs),
            "tasks": max(0, self._running_tasks() - self._tasks),
            "memory files": sum("memfd:" in name for name in open_files()),
            "temporary files": len(list(self._temporary.iterdir())),
            "children": len(set(children()) - self._others),
        }
        return [f"{number:d} {what}" for what, number in found.items() if number]

    def assert_tidy(self) -> None:
        """Nothing is left, and the next request is served."""
        self.futures = [future for future in self.futures if not future.done()]  # a result is held by its future
        until(lambda: not self.leftovers(), self.leftovers)
        assert self.serve(*self._first).status == 200
        self.futures = [future for future in self.futures if not future.done()]
        until(lambda: not self.leftovers(), self.leftovers)


@contextmanager
def house(
    engine: Engine,
    temporary: Path,
    door: str = "ingress",
    deadline_s: float = WAIT_S,
    max_bodies: int = MAX_BODIES,
    first: tuple[torch.Tensor | None, Output] = (None, Output.JPEG),
) -> Iterator[House]:
    """A server that has answered its first request; at the end no thread of it is left."""
    threads = set(threading.enumerate())
    there = House(engine, temporary)
    models = InProcess(model=there.pipeline.answer)
    make = create_app if door == "ingress" else partial(create_model_app, "model")
    setattr(http_bodies, "bytearray", there.new_body)  # noqa: B010  # a builtin's name, in that module alone
    try:
        with served(make(models, MAX_BODY, deadline_s, max_bodies=max_bodies)) as url:
            there.url, there.path = url, "/model" if door == "ingress" else "/"
            there.warm_up(*first)
            yield there
    finally:
        there.pipeline.close()
        delattr(http_bodies, "bytearray")
    until(lambda: set(threading.enumerate()) <= threads, lambda: set(threading.enumerate()) - threads)


class Gated(FakeEngine):
    """Decodes when it is let; knows what it was given, by the first value of each latent."""

    grouped = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.decoded: list[list[float]] = []

    def batch_limit(self, shape: tuple[int, ...], plan: TilingPlan, hints: RequestHints = NO_HINTS) -> int:
        return self.grouped

    def decode(self, latents: torch.Tensor, plan: TilingPlan, hints: RequestHints = NO_HINTS) -> Decoded:
        self.decoded.append(latents[:, 0, 0, 0].tolist())
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return super().decode(latents, plan, hints)

    def shut(self) -> None:
        self.decoded.clear()
        self.entered.clear()
        self.open.clear()


def post(z: torch.Tensor | None = None, output: Output = Output.JPEG, path: str = "/model", **headers: str) -> bytes:
    """A whole request."""
    z = torch.zeros(1, 4, 4, 4) if z is None else z
    query, sent, body = DecodeRequest(from_array(z), output=output).to_http()
    lines = {"host": "x", **sent, **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines["content-length"] = lines.get("content-length", str(len(bytes(body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path}?{urlencode(query, doseq=True)} HTTP/1.1\r\n{head}\r\n".encode() + bytes(body)


def until(condition: Callable[[], bool], otherwise: Callable[[], object] = lambda: "it did not come") -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, otherwise()
        time.sleep(0.01)


def open_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # closed meanwhile
            continue
    return names


def children() -> list[str]:
    """Processes that this one has started and not yet waited for."""
    found: list[str] = []
    for thread in os.listdir("/proc/self/task"):
        try:
            found += Path(f"/proc/self/task/{thread}/children").read_text().split()
        except OSError:
            continue
    return found


def hang_up(connection: socket.socket) -> None:
    """As a process does that was killed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def fields(answer: Answer) -> dict[str, Any]:
    return dict(json.loads(answer.body))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files would go. The collector rests: what is left must not wait for it to come round."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    gc.collect()
    gc.disable()
    yield folder
    gc.enable()


def gated(grouped: int = 1) -> Gated:
    engine = Gated(FakeEngineConfig())
    engine.load()
    engine.grouped = grouped
    return engine


def filled(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (1, 4, 4, 4), float(value))


def send(there: House, *pieces: bytes) -> socket.socket:
    connection = connect(there.url, WAIT_S)
    for piece in pieces:
        connection.sendall(piece)
    return connection
