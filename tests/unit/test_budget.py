"""What a replica may use of its device, and what it does before it is ready: weights that fit, shapes that are warm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from in_process import diffusers_engine
from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine import diffusers_engine as module
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.memory import budget as budgets
from remote_vae_serve.engine.memory.budget import GIB, budget, host_memory
from remote_vae_serve.engine.tiling import ONE_BY_ONE, SIZES, UNTILED, TilingPlan, plans
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from samples import latents, save_tiny_vae

FREE = 64 * GIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine with much memory free, and a container on it whose control group says what it is told."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(budgets, "CGROUP", tmp_path)

    def says(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text + "\n")

    return says


@pytest.mark.parametrize(
    ("arguments", "share"),
    [({}, 0.9), ({"num_gpus": 1}, 0.9), ({"num_gpus": 0.25}, 0.225), ({"num_gpus": 2}, 0.9), ({"memory": 0.5}, 0.5),
     ({"num_gpus": 1 / 32}, (2.5 - 0.5) / 80), ({"num_gpus": 1 / 160}, 0.25 / 80),  # a reserve of 512 MiB, but half at most
     ({"memory": 1}, 1.0), ({"memory": 20}, 0.25), ({"memory": 0.5, "num_gpus": 0.25}, 0.5)],
    ids=str,
)  # fmt: skip
def test_of_a_gpu_a_replica_uses_its_share_less_a_reserve_or_what_it_was_told(
    gpu: None, arguments: dict[str, Any], share: float
) -> None:
    assert budget(VAEConfig(source="demo", **arguments), "cuda") == pytest.approx(share * 80 * GIB)


@pytest.mark.parametrize(("free", "used"), [(64, 57.6), (5, 4.5), (4, 3.5), (2, 1.5), (1, 0.5), (0.5, 0.25), (0, 0)])
def test_the_reserve_of_a_small_host_is_512_mib_and_never_more_than_half(
    container: Callable[..., None], monkeypatch: pytest.MonkeyPatch, free: float, used: float
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free * GIB))
    assert budget(VAEConfig(source="demo"), "cpu") == pytest.approx(used * GIB, abs=1)


@pytest.mark.parametrize(("memory", "count"), [("auto", 0.9 * FREE), (0.5, FREE / 2), (1.5, 1.5 * GIB)])
def test_of_a_host_it_is_what_is_free_or_what_it_was_told(
    container: Callable[..., None], memory: Any, count: float
) -> None:
    assert budget(VAEConfig(source="demo", memory=memory, num_gpus=0.5), "cpu") == pytest.approx(count)


@pytest.mark.parametrize(
    ("limit", "used", "files", "free"),
    [
        ("max", 4, 2, FREE),
        (str(16 * GIB), 4, 0, 12 * GIB),
        (str(16 * GIB), 15, 11, 12 * GIB),  # what was read from files makes room, the weights first of all
        (str(256 * GIB), 4, 0, FREE),
        (str(2 * GIB), 3, 0, 0),
    ],
)
def test_in_a_container_the_limit_counts_and_cached_files_do_not(
    container: Callable[..., None], limit: str, used: int, files: int, free: int
) -> None:
    container(max=limit, current=str(used * GIB), stat=f"anon 12\ninactive_file {files * GIB}\nactive_file 7")
    assert host_memory() == free


@pytest.mark.parametrize(
    ("limit", "used", "files", "free"),
    [
        (9223372036854771712, 4, 0, FREE),  # what version 1 says where there is no limit
        (16 * GIB, 4, 0, 12 * GIB),
        (16 * GIB, 15, 11, 12 * GIB),
        (2 * GIB, 3, 0, 0),
    ],
)
def test_in_a_container_of_the_first_kind_of_control_groups_it_is_the_same(
    container: Callable[..., None], tmp_path: Path, limit: int, used: int, files: int, free: int
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in {
        "limit_in_bytes": str(limit), "usage_in_bytes": str(used * GIB),
        "stat": f"inactive_file 5\ntotal_rss 7\ntotal_inactive_file {files * GIB}",
    }.items():  # fmt: skip
        (tmp_path / "memory" / f"memory.{name}").write_text(text + "\n")
    assert host_memory() == free


def test_a_machine_without_control_groups_has_what_is_available(container: Callable[..., None]) -> None:
    assert host_memory() == FREE
    container(max="1000")  # and no other file
    assert host_memory() == FREE


def test_plans_go_from_the_whole_to_ever_smaller_tiles_that_are_smaller_than_the_picture() -> None:
    assert plans(2048, 512, True) == [UNTILED, *map(TilingPlan, SIZES)]
    assert plans(400, 512, True) == [UNTILED, TilingPlan(384), TilingPlan(256)]
    assert plans(256, 256, True) == plans(4096, 4096, False) == [UNTILED]
    apart = [TilingPlan(size, one_by_one=True) for size in SIZES]
    assert plans(2048, 512, True, batch=3) == [UNTILED, ONE_BY_ONE, *apart]
    assert plans(2048, 512, True, batch=3, has_batches=False) == [ONE_BY_ONE, *apart]
    assert plans(2048, 512, True, batch=1, has_batches=False) == [UNTILED, *map(TilingPlan, SIZES)]
    every = plans(2048, 512, True, batch=3)
    assert [[one.takes_less_than(other) for one in every] for other in every] == [
        [number > place for number in range(len(every))] for place in range(len(every))
    ]
    assert list(SIZES) == sorted(SIZES, reverse=True)
    assert all(int(size // 8 * 0.75) * 8 == int(size * 0.75) for size in SIZES)  # strides of tiles fall on latents


def test_weights_that_alone_exceed_the_budget_are_a_reason_and_no_replica_that_refuses_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "budget", lambda *_: 1000)
    with pytest.raises(ModelFailed, match=r"weights.*`memory`.*give it more"):
        diffusers_engine(folder)


def test_on_a_host_that_replicas_may_share_the_log_says_what_each_takes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "ray.serve"):
        diffusers_engine(folder, memory=2)
        assert "`memory`" not in caplog.text
        engine = diffusers_engine(folder)
    assert f"may take {engine.planner.budget / GIB:.2f} GiB" in caplog.text
    assert "give each its own `memory`" in caplog.text


def decodes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are decoded from here on."""
    shapes: list[tuple[int, ...]] = []
    decode = DiffusersEngine.decode

    def spied(
        self: DiffusersEngine, z: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS
    ) -> Any:
        shapes.append(tuple(z.shape))
        return decode(self, z, plan, hints)

    monkeypatch.setattr(DiffusersEngine, "decode", spied)
    return shapes


def test_declared_shapes_are_decoded_before_the_replica_is_ready_and_others_are_served_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = decodes_of(monkeypatch)
    loaded = diffusers_engine(folder, warm_up=[[1, 4, 4, 6], [2, 4, 4, 4], [4, 2, 2], [1, 4, 3, 2, 2]])
    assert shapes == [(1, 4, 4, 6), (2, 4, 4, 4), (1, 4, 2, 2), (3, 4, 2, 2)]  # as requests of those shapes are
    z = latents(1, 4, 5, 3)
    assert loaded.decode(z, loaded.plan_decode(tuple(z.shape))).pixels.shape == (1, 3, 40, 24)


@pytest.mark.parametrize("shape", [[1, 16, 4, 4], [4, 4], [1, 24, 64], [1, 4, 1024, 1024]])
def test_a_warm_up_that_cannot_be_decoded_is_a_reason_and_no_crash(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shape: list[int]
) -> None:
    monkeypatch.setattr(module, "budget", lambda *_: 2**26)
    with pytest.raises(ModelFailed, match="warm_up") as caught:
        diffusers_engine(folder, warm_up=[shape])
    assert str(shape) in caught.value.message


def test_a_warm_up_that_breaks_the_model_is_a_reason_and_no_crash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(DiffusersEngine, "decode", broken)
    with pytest.raises(ModelFailed, match=r"warm_up \[1, 4, 4, 4\]: ValueError: not enough values"):
        diffusers_engine(folder, warm_up=[[1, 4, 4, 4]])
