"""Health checks: each thing that a replica cannot work without is broken, and it says so; what clients send never counts."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import serve
from starlette.testclient import TestClient

from house import until
from in_process import InProcess, diffusers_engine
from remote_vae.errors import BadRequest, InternalError, ModelFailed, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest, Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.config import FakeEngineConfig, VAEConfig
from remote_vae_serve.engine.base import Decoded, Engine
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.http.app import create_app
from remote_vae_serve.ingress import ingress, model_registry
from remote_vae_serve.ingress.model_registry import CHECKS_WITHOUT_NEWS, ModelRegistry
from remote_vae_serve.replica import device_worker, replica
from remote_vae_serve.replica.device_worker import DeviceWorker, Job
from remote_vae_serve.replica.health import EDGE, Probe
from remote_vae_serve.replica.latency import LatencyEstimator
from remote_vae_serve.replica.pipeline import Pipeline
from remote_vae_serve.replica.replica import VAE
from samples import KINDS, latents, save_tiny_vae, tiny_vae

WAIT_S = 10.0
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
        began = time.perf_counter()
        try:
            asyncio.run(self.vae.check_health())
        finally:
            assert time.perf_counter() - began < 0.5

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
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="model"))
    monkeypatch.setattr("ray.get_gpu_ids", list)
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


def test_a_replica_is_well_idle_or_busy(engine: Sick, sick: Replica) -> None:
    sick.assert_well()
    engine.entered.clear()
    engine.gate.clear()
    asking = threading.Thread(target=sick.post, args=(latents(1, 4, 8, 8),))
    asking.start()
    assert engine.entered.wait(WAIT_S)
    began = time.perf_counter()
    for _ in range(100):
        asyncio.run(sick.vae.check_health())
    each_ms = (time.perf_counter() - began) * 10
    print(f"a health check beside a decode that does not end, with an event loop made for it: {each_ms:.2f} ms")
    assert each_ms < 100
    engine.gate.set()
    asking.join(WAIT_S)
    assert engine.probed == 1  # when it was loaded


def test_a_dead_thread_leaves_nobody_waiting(engine: Sick, sick: Replica) -> None:
    worker = sick.pipeline._worker
    engine.gate.clear()
    engine.entered.clear()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(sick.post(latents(1, 4, 8, 8))))
    first.start()
    assert engine.entered.wait(WAIT_S)
    waiting = job()
    worker.submit(waiting)
    worker._take_with = kill_here  # type: ignore[method-assign]
    engine.gate.set()
    first.join(WAIT_S)
    with pytest.raises(Unavailable, match="being replaced"):
        waiting.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    assert [answer.status_code for answer in answers] == [200]
    after = job()
    worker.submit(after)
    with pytest.raises(Unavailable, match="being replaced"):
        after.done.result(0)
    assert worker.wait_s() == float("inf")
    sick.assert_to_be_replaced("thread has ended")


def kill_here(first: Job) -> None:
    raise SystemExit


def test_what_waits_for_a_thread_that_dies_is_told_so() -> None:
    held, go = threading.Event(), threading.Event()

    def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        held.set()
        assert go.wait(WAIT_S)
        return batch, None

    worker = DeviceWorker(nullcontext, probe=lambda: "lost" if go.is_set() else None)
    first, failing, left, waiting = job(hold), job(fails), job(), job()
    for one in (first, failing, left, waiting):
        worker.submit(one)
    assert held.wait(WAIT_S)
    assert left.done.cancel()
    go.set()
    assert first.done.result(WAIT_S).output.shape == (1,)
    for one in (failing, waiting):
        with pytest.raises(Unavailable, match="being replaced"):
            one.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    assert worker.fault == "lost"


def fails(batch: torch.Tensor) -> Any:
    raise LOST


def test_a_thread_killed_while_it_waits_is_found_dead(sick: Replica) -> None:
    worker = sick.pipeline._worker
    kill(worker._thread)
    asked = job()
    worker.submit(asked)
    with pytest.raises(Unavailable):
        asked.done.result(WAIT_S)
    until(lambda: not worker._thread.is_alive())
    sick.assert_to_be_replaced("thread has ended")


def test_a_stream_that_cannot_be_made_is_a_dead_device() -> None:
    def enter() -> Any:
        raise LOST

    worker = DeviceWorker(enter)
    until(lambda: not worker._thread.is_alive())
    assert worker.fault == "the device's thread has ended"


def test_a_lost_cuda_context_is_found_by_the_request_that_meets_it_and_nobody_gets_a_500(
    engine: Sick, sick: Replica
) -> None:
    sick.assert_well()
    engine.always = LOST
    for _ in range(3):
        sick.assert_to_be_replaced("illegal memory access")


def test_all_that_wait_for_a_lost_device_are_told_to_come_again(engine: Sick, sick: Replica) -> None:
    async def ask() -> list[Any]:
        requests = [DecodeRequest(from_array(latents(1, 4, 8, 8))) for _ in range(6)]
        asked = [asyncio.create_task(sick.vae.answer(request)) for request in requests]
        while not engine.entered.is_set():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        engine.always = LOST
        engine.gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    engine.entered.clear()
    engine.gate.clear()
    answers = asyncio.run(ask())
    assert [type(answer) for answer in answers] == [Unavailable] * 6
    assert engine.probed == 2  # one decided for all


@pytest.mark.parametrize("broken", ["_unpackers", "_writers"])
def test_a_pool_that_is_gone_is_found(sick: Replica, broken: str) -> None:
    sick.assert_well()
    getattr(sick.pipeline, broken).shutdown()
    sick.assert_to_be_replaced("takes no work", Output.PNG)


def test_weights_that_are_spoilt_are_found_in_a_pause(
    engine: Sick, make: Callable[[Engine], Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_worker, "PAUSE_S", 0.05)
    one = make(engine)
    one.assert_well()
    engine.always = NAN
    # It rests once in each pause; this one begins behind a request that never came to the engine.
    one.pipeline._worker.submit(job())
    until(lambda: one.pipeline.fault() is not None)
    one.assert_to_be_replaced("NaN or infinity")


def test_weights_that_are_spoilt_are_found_by_a_client_who_would_be_blamed_for_them(
    engine: Sick, sick: Replica
) -> None:
    engine.always = NAN
    sick.assert_to_be_replaced("NaN or infinity")


OF_CLIENTS = {
    "makes NaN": (NAN, 400),
    "is refused": (BAD_REQUEST, 400),
    "runs out of memory": (FULL, 503),
    "runs out of memory in other words": (MemoryError(), 500),
    "crashes": (LOST, 500),
    "exits": (SystemExit(), 500),
}


@pytest.mark.parametrize("case", OF_CLIENTS)
def test_what_happens_to_one_request_is_nothing_against_the_replica(engine: Sick, sick: Replica, case: str) -> None:
    engine.of_clients, status = OF_CLIENTS[case]
    for _ in range(3):
        assert sick.post(latents(1, 4, 8, 8)).status_code == status
        sick.check()
    engine.of_clients = None
    sick.assert_well()


def test_latents_of_nan_and_shapes_of_nothing_are_nothing_against_the_replica(sick: Replica) -> None:
    assert sick.post(torch.full((1, 4, 8, 8), torch.nan)).status_code == 400
    assert sick.post(torch.zeros(1, 3, 8, 8)).status_code == 400
    sick.assert_well()


@pytest.mark.parametrize("error", [FULL, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), BAD_REQUEST])
def test_a_probe_for_which_there_is_no_room_says_nothing(engine: Sick, sick: Replica, error: Exception) -> None:
    engine.always = error
    sick.post(latents(1, 4, 8, 8))
    sick.check()


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


def save_nan(kind: str, folder: Path) -> Path:
    vae = tiny_vae(kind)
    parameter = next(vae.decoder.parameters())
    parameter.data[:] = torch.nan
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["sd", "hunyuan"])
def test_a_model_of_nan_is_failed_with_the_reason_and_not_started_for_ever(
    kind: str, make: Callable[[Engine], Replica], tmp_path: Path
) -> None:
    one = make(DiffusersEngine(VAEConfig(source=str(save_nan(kind, tmp_path)), threads=1), "cpu"))
    assert one.vae.description()["state"] == "failed"
    assert "NaN" in one.vae.description()["reason"]
    answer = one.post(latents(1, 4, 8, 8))
    assert (answer.status_code, answer.json()["code"]) == (503, "model_failed")
    assert "NaN" in answer.json()["error"]
    one.check()


def test_a_device_that_fails_when_the_model_is_loaded_is_a_failed_model(
    engine: Sick, make: Callable[[Engine], Replica]
) -> None:
    engine.always = LOST
    one = make(engine)
    assert "illegal memory access" in one.vae.description()["reason"]
    one.check()


@pytest.mark.parametrize("error", [BAD_REQUEST, FULL, RuntimeError("kernel size can't be greater than input size")])
def test_a_model_that_takes_no_such_latent_is_served_and_not_probed(
    engine: Sick, make: Callable[[Engine], Replica], error: Exception
) -> None:
    engine.always = error
    one = make(engine)
    assert one.vae.description()["state"] == "ready"
    engine.always, engine.of_clients = None, LOST
    probed = engine.probed
    assert one.post(latents(1, 4, 8, 8)).status_code == 500
    assert engine.probed == probed
    one.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_kinds_are_probed_with_a_latent_that_is_always_the_same(kind: str, tmp_path: Path) -> None:
    engine = diffusers_engine(save_tiny_vae(kind, tmp_path))
    seen: list[torch.Tensor] = []
    decode = engine.decode
    engine.decode = lambda z, *arguments: seen.append(z) or decode(z, *arguments)  # type: ignore[method-assign, func-returns-value]
    probe = Probe(engine)
    assert probe.shape == ((1, 4, 1, 4, 4) if kind == "hunyuan" else (1, engine.space.channels, 4, 4))
    assert probe.fault() is None
    assert torch.equal(seen[0], seen[1])
    for parameter in engine._model(engine.dtype).decoder.parameters():
        parameter.data[:] = torch.nan
    assert probe.fault() == "the model decodes a small fixed latent to NaN or infinity"


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


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Reading:
    monkeypatch.setattr(model_registry, "REFRESH_S", 0.01)
    return Reading()


def checks(registry: Reading, count: int) -> list[str | None]:
    """Of a Serve that checks as often as the registry could have read."""
    found = []
    for _ in range(count):
        had = registry.reads
        if registry._thread.is_alive():
            give_up = time.monotonic() + 0.1
            while registry.reads < had + 2 and time.monotonic() < give_up:
                time.sleep(0.005)
        found.append(registry.fault())
    return found


def test_an_ingress_is_well_as_long_as_it_hears_of_the_models(registry: Reading) -> None:
    assert checks(registry, 2 * CHECKS_WITHOUT_NEWS) == [None] * 2 * CHECKS_WITHOUT_NEWS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_ingress_whose_thread_has_ended_is_replaced(registry: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends() -> None:
        raise SystemExit

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
    time.sleep(0.05)
    registry.fault()
    found = checks(registry, CHECKS_WITHOUT_NEWS)
    assert found[:-1] == [None] * (CHECKS_WITHOUT_NEWS - 1)
    assert "nothing was read" in (found[-1] or "")
    registry.answer = lambda: None
    go.set()
    time.sleep(0.05)
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


def test_a_failed_model_is_well(make: Callable[[Engine], Replica], engine: Sick) -> None:
    def load() -> None:
        raise ModelFailed("no weights")

    engine.load = load  # type: ignore[method-assign]
    one = make(engine)
    assert one.post(latents(1, 4, 8, 8)).json()["code"] == "model_failed"
    one.check()
