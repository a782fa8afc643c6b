"""Where Ray spills to: memory, for one user alone, as long as the server runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remote_vae.ray_internals import SPILL_VARIABLE, UNFUSED_VARIABLES
from remote_vae_serve.launcher import spill_directory as module
from remote_vae_serve.launcher.spill_directory import spill_directory


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What stands for /dev/shm; with room in it, whatever this machine has."""
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    monkeypatch.setattr(module, "LEAST", 0)
    return tmp_path


def test_it_is_a_folder_in_memory_of_its_owner_alone_and_goes_with_what_is_in_it(memory: Path) -> None:
    with spill_directory({}) as added:
        folder = Path(added[SPILL_VARIABLE])
        assert added.items() >= UNFUSED_VARIABLES.items()
        assert folder.parent == memory
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "ray_spilled_objects").mkdir()
        (folder / "ray_spilled_objects" / "latents").write_bytes(b"some")
    assert not list(memory.iterdir())


def test_what_a_killed_launcher_has_left_is_removed_and_what_a_living_one_has_is_not(memory: Path) -> None:
    for pid in (2**22 + 1, os.getpid()):  # no process has so large a number
        (memory / f"remote-vae-spill-{pid}-x").mkdir()
    with spill_directory({}):
        assert [path.name for path in memory.iterdir() if path.name.endswith("-x")] == [
            f"remote-vae-spill-{os.getpid()}-x"
        ]


def test_a_directory_that_the_operator_has_chosen_is_left_to_him() -> None:
    with spill_directory({SPILL_VARIABLE: "/mnt/spill"}) as added:
        assert added == UNFUSED_VARIABLES
    with spill_directory({}, is_ours=False) as added:
        assert added == {}


def test_without_room_in_memory_ray_chooses(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 2**62)
    with spill_directory({}) as added:
        assert added == UNFUSED_VARIABLES
    monkeypatch.setattr(module, "MEMORY", memory / "none")
    with spill_directory({}) as added:
        assert added == UNFUSED_VARIABLES
