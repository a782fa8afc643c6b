"""A replica whose engine can be broken, and what breaks it."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import serve
from starlette.testclient import TestClient

from in_process import InProcess
from limits import WAIT_S
from remote_vae.errors import BadRequest, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.config import FakeEngineConfig, VAEConfig
from remote_vae_serve.engine.base import Decoded, Engine
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.http.app import create_app
from remote_vae_serve.replica import handing_on, replica
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from remote_vae_serve.replica.health import EDGE
from remote_vae_serve.replica.pipeline import Pipeline
from remote_vae_serve.replica.replica import VAE
from samples import latents

LOST = RuntimeError("CUDA error: an illegal memory access was encountered")
NAN = BadRequest("The decoder makes NaN or infinity of these latents", parameter="tensor")
BAD_REQUEST, FULL = BadRequest("no", parameter="shape"), Unavailable("Out of memory", retry_after=5)


class Sick(FakeEngine):
    """Fails as it is told: at every decode, or at those of a client, which are larger than the probe's; `gate` shut, it waits."""

    def __init__(self) -> None:
        super().__init__(FakeEngineConfig())
        self.is_probed = True
        self.always: BaseException | None = None
        self.of_clients: BaseException | None = None
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.probed = 0

    def decode(self, latents: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS) -> Decoded:
        is_probe = latents.shape[-1] == EDGE
        self.probed += is_probe
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if self.always or (self.of_clients and not is_probe):
            raise self.always or self.of_clients  # type: ignore[misc]
        return super().decode(latents, plan, hints)

    def batch_limit(self, shape: tuple[int, ...], plan: TilingPlan, hints: RequestHints = NO_HINTS) -> int:
        return 8


class Replica:
    """A replica without Serve, behind HTTP."""

    def __init__(self, engine: Engine) -> None:
        self.vae = VAE(VAEConfig(source="x"))
        self.client = TestClient(create_app(InProcess(model=self.vae.answer), 1 << 28, WAIT_S))

    @property
    def pipeline(self) -> Pipeline:
        assert self.vae._pipeline is not None
        return self.vae._pipeline

    def check(self) -> None:
        asyncio.run(self.vae.check_health())

    def post(self, z: torch.Tensor, output: Output = Output.PT) -> Any:
        query, headers, body = DecodeRequest(from_array(z), output=output).to_http()
        return self.client.post("/model", params=query, headers=headers, content=bytes(body))

    def assert_well(self) -> None:
        self.check()
        assert self.post(latents(1, 4, 8, 8)).status_code == 200
        self.check()

    def assert_to_be_replaced(self, why: str, output: Output = Output.PT) -> None:
        answer = self.post(latents(1, 4, 8, 12), output)  # a shape that is new: small ones it knows go no detour
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert "being replaced" in answer.json()["error"]
        with pytest.raises(RuntimeError, match=f"is to be replaced: .*{why}"):
            self.check()


@pytest.fixture
def engine() -> Sick:
    return Sick()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Engine], Replica]]:
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="model", replica_tag="model"))
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr(handing_on, "_replicas", lambda application: 1)  # of a Serve that does not run
    made: list[Replica] = []

    def make(engine: Engine) -> Replica:
        monkeypatch.setattr(replica, "build_engine", lambda config, on_event: engine)
        made.append(Replica(engine))
        return made[-1]

    yield make
    for one in made:
        if one.vae._pipeline is not None:
            one.vae._pipeline.close()


@pytest.fixture
def sick(engine: Sick, make: Callable[[Engine], Replica]) -> Replica:
    return make(engine)


def kill(thread: threading.Thread) -> None:
    """As nothing that Python code does can: it ends where it waits."""
    assert (
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)) == 1
    )


def job(run: Any = lambda batch: (batch, None), **fields: Any) -> Job:
    return Job(torch.zeros(1), run, fields.pop("finish", lambda part: part), **fields)


def worked(worker: DeviceWorker) -> bool:
    done = job()
    worker.submit(done)
    return done.done.result(WAIT_S).output.shape == (1,)
