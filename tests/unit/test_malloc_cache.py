"""Memory that a CPU's work has freed: kept for the next work like it, given back before other work and in a pause. Each in a
process of its own: glibc reads its settings when one starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL

from fresh_process import printed_by
from remote_vae_serve.engine.memory.budget import host_memory
from remote_vae_serve.engine.memory.malloc_cache import ENVIRONMENT, MallocCache

SCRIPT = """
import json, resource, sys
import torch
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
folder, memory, sizes = json.loads(sys.argv[1])
engine = DiffusersEngine(VAEConfig(source=folder, device="cpu", num_gpus=0, engine="eager", dtype="float32", memory=memory,
                                   threads=1), "cpu")
engine.load()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
told = []
for size in sizes:
    latents, before = torch.zeros(1, 4, size, size), faults()
    pixels = engine.decode(latents, engine.plan_decode(tuple(latents.shape))).pixels
    told.append({"faults": faults() - before, "resident": resident()})
    del pixels
engine.on_idle()
told.append({"resident": resident()})
print(json.dumps(told))
"""
KEEPS = os.environ | ENVIRONMENT
KEEPS_NOT = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
MIB = 2**20

pytestmark = pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
                                reason="another C library than glibc keeps memory in its own way")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose decode of 32x32 latents frees a hundred megabytes, in a few large blocks."""
    folder = tmp_path_factory.mktemp("kept")
    AutoencoderKL(
        block_out_channels=(64, 64, 64, 64), latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def decodes(folder: Path, environment: Mapping[str, str], *sizes: int, memory: float = 4.0) -> list[dict[str, Any]]:
    """What decodes of so many latents along an edge took, one after the other, and what a pause left."""
    given = json.dumps([str(folder), memory, sizes])
    told: list[dict[str, Any]] = json.loads(printed_by(SCRIPT, given, environment=environment))
    return told


@pytest.fixture(scope="module")
def kept(folder: Path) -> list[dict[str, Any]]:
    return decodes(folder, KEEPS, 32, 32, 32, 4, 32)


@pytest.mark.slow
def test_the_next_decode_of_a_shape_finds_its_memory_there(folder: Path, kept: list[dict[str, Any]]) -> None:
    plain = decodes(folder, KEEPS_NOT, 32, 32, 32)
    assert kept[2]["faults"] < plain[2]["faults"] / 4


@pytest.mark.slow
def test_other_work_does_not_find_it_beside_its_own(kept: list[dict[str, Any]]) -> None:
    large, small = kept[2:4]
    assert small["resident"] < large["resident"] - 50 * MIB


@pytest.mark.slow
def test_in_a_pause_it_goes_back_to_the_system(kept: list[dict[str, Any]]) -> None:
    last, rested = kept[4:]
    assert rested["resident"] < last["resident"] - 50 * MIB


@pytest.mark.slow
def test_where_the_budget_has_no_room_for_it_nothing_is_kept(folder: Path, kept: list[dict[str, Any]]) -> None:
    """So that `memory` stays what work may take."""
    first, second, _ = decodes(folder, KEEPS, 32, 32, memory=300 * MIB / host_memory())
    assert max(first["resident"], second["resident"]) < kept[1]["resident"] - 50 * MIB
    assert second["faults"] > 4 * kept[1]["faults"]


def test_a_process_that_was_not_started_so_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    kept = MallocCache()
    assert not kept.works
    kept.prepare("a", 1, 100)
    kept.give_back()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert MallocCache().works
