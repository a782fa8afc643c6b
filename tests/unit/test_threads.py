"""Threads of an operation on a CPU: what the replica was told, may use, and shares with others that are at work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest
import torch

from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine import threads
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.threads import ThreadCount, usable_cpus

CPUS = 4
OTHER = """
import sys
from pathlib import Path
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.threads import ThreadCount
count = ThreadCount(VAEConfig(source="demo"), Path(sys.argv[1]))
for line in sys.stdin:
    with count.shared():
        print("at work", flush=True)
        sys.stdin.readline()
    print("idle", flush=True)
"""


@pytest.fixture(autouse=True)
def _four_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cpus", lambda: CPUS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@contextmanager
def another_replica(lock_file: Path) -> Iterator[Callable[[str], None]]:
    """A process like another replica's; a call has it begin or end an operation, and returns when it has."""
    paths = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
    process = subprocess.Popen(
        [sys.executable, "-c", paths + OTHER, str(lock_file)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def until(state: str) -> None:
        if state == "killed":
            process.kill()
            process.wait()
            return
        stdin.write("\n")
        stdin.flush()
        assert stdout.readline() == f"{state}\n"

    try:
        yield until
    finally:
        process.kill()
        process.wait()
        stdout.close()
        with suppress(BrokenPipeError):
            stdin.close()


def threads_of(config: VAEConfig, lock_file: Path) -> int:
    """What torch itself says within an operation."""
    with ThreadCount(config, lock_file).shared() as told:
        assert torch.get_num_threads() == told
        return told


@pytest.mark.parametrize(
    ("told", "expected"),
    [({}, CPUS), ({"num_cpus": 0.9}, CPUS), ({"num_cpus": 3.5}, 3), ({"threads": 7}, 7), ({"threads": 1, "num_cpus": 3}, 1)],
)  # fmt: skip
def test_a_replica_alone_has_what_it_was_told_or_all_it_may_use(
    told: dict[str, float], expected: int, lock_file: Path
) -> None:
    assert threads_of(VAEConfig(source="demo", **told), lock_file) == expected  # type: ignore[arg-type]


def test_replicas_at_work_share_the_cpus_and_idle_or_killed_ones_take_none(lock_file: Path) -> None:
    config = VAEConfig(source="demo")
    with another_replica(lock_file) as one, another_replica(lock_file) as two:
        assert threads_of(config, lock_file) == CPUS
        one("at work")
        assert threads_of(config, lock_file) == CPUS // 2
        two("at work")
        assert threads_of(config, lock_file) == CPUS // 3
        one("idle")
        assert threads_of(config, lock_file) == CPUS // 2
        two("killed")
        assert threads_of(config, lock_file) == CPUS


def test_what_was_told_is_obeyed_beside_others(lock_file: Path) -> None:
    with another_replica(lock_file) as other:
        other("at work")
        assert threads_of(VAEConfig(source="demo", threads=3), lock_file) == 3
        assert threads_of(VAEConfig(source="demo", num_cpus=2), lock_file) == 2


def test_more_replicas_than_cpus_have_a_thread_each(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)
    with another_replica(lock_file) as other:
        other("at work")
        assert threads_of(VAEConfig(source="demo"), lock_file) == 1


def test_where_replicas_cannot_know_of_each_other_nothing_fails(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "link").symlink_to(elsewhere)
    for path in (tmp_path, tmp_path / "link", tmp_path / "missing" / "locks"):
        assert threads_of(VAEConfig(source="demo"), path) == CPUS
    assert not elsewhere.exists()


def test_the_engine_decodes_with_its_share_on_whichever_thread_that_is(lock_file: Path) -> None:
    """OpenMP keeps the number for each thread: what is set where the model is loaded is not that of the device's thread."""
    config = VAEConfig(source="demo", device="cpu", num_gpus=0, dtype="float32")
    engine = DiffusersEngine(config, "cpu")
    engine._threads = ThreadCount(config, lock_file)
    engine.load()
    latents, seen = torch.zeros(1, engine.space.channels, 4, 4), []
    model = engine._model(torch.float32)
    model.decoder.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))

    def decode() -> None:
        thread = Thread(target=engine.decode, args=(latents, engine.plan_decode(tuple(latents.shape))))
        thread.start()
        thread.join()

    with another_replica(lock_file) as other:
        decode()
        other("at work")
        decode()
    assert seen == [CPUS, CPUS // 2]


V2, V1 = "0::{}\n", "12:cpuset:/\n4:cpu,cpuacct:{}\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "200000 100000"}, 2),
        (V2.format("/pod/box"), {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),
        (V2.format("/pod/box"), {"pod/box/cpu.max": "100000 100000", "pod/cpu.max": "300000 100000"}, 1),
        (V2.format("/pod"), {"pod/cpu.max": "max 100000"}, CPUS),
        (V2.format("/"), {"cpu.max": "800000 100000"}, CPUS),
        (V2.format("/"), {"cpu.max": "20000 100000"}, 1),
        (V2.format("/"), {"cpu.max": "149000 100000"}, 1),
        (V2.format("/"), {"cpu.max": "150000 100000"}, 2),
        (V2.format("/"), {"cpu.max": "of another kernel"}, CPUS),
        (V2.format("/../.."), {"cpu.max": "200000 100000"}, 2),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CPUS),
        (V1.format("/docker/1f"), {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("", {}, CPUS),
        ("what is this\n", {}, CPUS),
    ],
)  # fmt: skip
def test_the_quota_of_the_container_counts(
    cgroup: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(CPUS)))
    (tmp_path / "self").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cpus(tmp_path / "self", tmp_path / "mounted") == expected


def test_a_system_without_control_groups_and_affinity_has_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 6)
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 6
    monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == 1
