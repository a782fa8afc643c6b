"""Whether bfloat16 is faster on this host: measured once, kept in a file that nobody has to trust."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from remote_vae_serve.engine import bfloat16_speed
from remote_vae_serve.engine.bfloat16_speed import CPUINFO, is_bfloat16_faster, speed_of

AMX = "processor\t: 0\nmodel name\t: A Xeon\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n\nprocessor\t: 1\n"


class Measured:
    """A measurement that gives these numbers in turn, and counts."""

    def __init__(self, *speeds: float) -> None:
        self.speeds, self.count = speeds, 0

    def __call__(self) -> float:
        self.count += 1
        return self.speeds[min(self.count, len(self.speeds)) - 1]


@pytest.fixture
def amx(tmp_path: Path) -> Path:
    return described(tmp_path, AMX)


def described(folder: Path, processor: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(processor)
    return path


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_it_is_measured_once_a_host_and_kept(amx: Path, tmp_path: Path) -> None:
    measure, folder = Measured(7.5, 2.0), tmp_path / "not" / "yet there"
    assert [speed_of(amx, folder, measure) for _ in range(3)] == [7.5] * 3
    assert measure.count == 1
    assert "A Xeon" not in only_file(folder).read_text()


@pytest.mark.parametrize(
    ("processor", "count"),
    [
        ("flags : fpu avx2 fma", 0), ("flags : avx512f avx512_vnni", 0), ("Features : fp asimd", 0), ("", 0),
        ("flags : avx512f avx512_bf16", 1), ("Features : fp asimd bf16 i8mm", 1),
    ],
)  # fmt: skip
def test_without_instructions_for_it_nothing_is_measured(tmp_path: Path, processor: str, count: int) -> None:
    measure = Measured(9.0)
    assert speed_of(described(tmp_path, processor), tmp_path / "kept", measure) == (9.0 if count else 1.0)
    assert measure.count == count


def test_where_the_processors_are_not_described_nothing_is_measured(tmp_path: Path) -> None:
    assert speed_of(tmp_path / "nowhere", tmp_path, Measured(9.0)) == 1.0


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_it_is_measured_anew_where_instructions_are_forbidden(
    amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    measure, folder = Measured(7.5, 0.5), tmp_path / "kept"
    assert speed_of(amx, folder, measure) == 7.5
    monkeypatch.setenv(name, "AVX2")
    assert speed_of(amx, folder, measure) == 0.5
    monkeypatch.delenv(name)
    assert speed_of(amx, folder, measure) == 7.5
    assert measure.count == 2


def test_it_is_measured_anew_by_another_torch_and_on_another_processor(
    amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, folder = Measured(1.0, 2.0, 3.0), tmp_path / "kept"
    speed_of(amx, folder, measure)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert speed_of(amx, folder, measure) == 2.0
    assert speed_of(described(tmp_path, AMX.replace("A Xeon", "Another")), folder, measure) == 3.0
    assert len(list(folder.iterdir())) == 3


def _spoiled(kept: dict[str, object]) -> dict[str, bytes]:
    fields: dict[str, dict[str, object]] = {
        "of another key": {"key": "other"}, "no number": {"speed": "7.5"}, "true": {"speed": True},
        "infinity": {"speed": math.inf}, "NaN": {"speed": math.nan}, "negative": {"speed": -1.0}, "null": {"speed": None},
    }  # fmt: skip
    return {
        "empty": b"", "half": json.dumps(kept).encode()[:30], "not UTF-8": b"\xff\xfe\x00", "a list": b"[1]", "deep": b"[" * 4000,
        "no key": b'{"speed": 7.5}', "no speed": json.dumps({"key": kept["key"]}).encode(), "huge": b" " * 9_000_000,
    } | {name: json.dumps(kept | field).encode() for name, field in fields.items()}  # fmt: skip


@pytest.mark.parametrize("damage", _spoiled({"key": ""}))
def test_a_file_that_is_none_of_ours_is_measured_anew_and_replaced(amx: Path, tmp_path: Path, damage: str) -> None:
    measure, folder = Measured(7.5, 3.0), tmp_path / "kept"
    speed_of(amx, folder, measure)
    path = only_file(folder)
    path.write_bytes(_spoiled(json.loads(path.read_text()))[damage])
    assert speed_of(amx, folder, measure) == 3.0
    assert speed_of(amx, folder, measure) == 3.0
    assert measure.count == 2


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_folder(path: Path) -> None:
    path.unlink()
    (path / "in it").mkdir(parents=True)


def _a_link_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("put", [_a_pipe, _a_folder, _a_link_in_a_circle])
def test_what_lies_there_and_is_no_file_stops_nobody(amx: Path, tmp_path: Path, put: Callable[[Path], None]) -> None:
    measure, folder = Measured(7.5, 3.0), tmp_path / "kept"
    speed_of(amx, folder, measure)
    put(only_file(folder))
    assert speed_of(amx, folder, measure) == 3.0


def test_where_nothing_can_be_written_it_is_measured_each_time(amx: Path) -> None:
    """Below a file, not in a folder without write permission: root may write everywhere."""
    measure = Measured(7.5)
    assert [speed_of(amx, amx / "below a file", measure), speed_of(amx, None, measure)] == [7.5] * 2
    assert [speed_of(amx, Path("/proc/remote-vae"), measure)] == [7.5]
    assert measure.count == 3


def test_a_write_that_fails_leaves_nothing_behind(amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert speed_of(amx, tmp_path / "kept", Measured(7.5)) == 7.5
    assert list((tmp_path / "kept").iterdir()) == []


def test_several_at_once_get_a_number_each_and_leave_one_file(amx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"

    def measure() -> float:
        time.sleep(0.02)
        return 7.5

    with ThreadPoolExecutor(8) as threads:
        speeds = list(threads.map(lambda _: speed_of(amx, folder, measure), range(40)))
    assert speeds == [7.5] * 40
    assert json.loads(only_file(folder).read_text())["speed"] == 7.5


def test_two_processes_at_once_agree_on_this_host(tmp_path: Path) -> None:
    """The real measurement, by the real path; however fast it is here."""
    say = "from remote_vae_serve.engine.bfloat16_speed import is_bfloat16_faster as faster; print(faster())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", say], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert said in (["True"] * 2, ["False"] * 2)
    has_them = bfloat16_speed.INSTRUCTIONS & set(CPUINFO.read_text().split())
    assert len(list(tmp_path.rglob("*.json"))) == (1 if has_them else 0)


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert bfloat16_speed._cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert bfloat16_speed._cache_folder() == Path("/somewhere/remote-vae")


def test_a_small_gain_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for speed, worth in ((1.49, False), (1.5, True)):
        monkeypatch.setattr(bfloat16_speed, "speed_of", lambda cpuinfo, folder, speed=speed: speed)
        is_bfloat16_faster.cache_clear()
        assert is_bfloat16_faster() is worth
    is_bfloat16_faster.cache_clear()


def test_it_takes_a_second_at_most_and_leaves_the_threads_as_they_were() -> None:
    before, started = torch.get_num_threads(), time.thread_time()
    assert bfloat16_speed._measure() > 0
    assert time.thread_time() - started < 1.0
    assert torch.get_num_threads() == before
