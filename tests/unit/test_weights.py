"""Where weights are found, and each way in which they are not: provoked for real, in a process with a Hub and a cache of
its own, since huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL

from fake_hub import COMMIT, FakeHub, fake_hub
from limits import stretched
from local_server import free_port
from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.weights import DEMO, fetch
from samples import KL, save_tiny_vae, tiny_vae

SCRIPT = """
import json, sys
from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.weights import fetch
for arguments in json.loads(sys.argv[1]):
    try:
        weights = fetch(VAEConfig(**arguments))
        told = {"folder": str(weights.folder), "revision": weights.revision, "class": weights.config()["_class_name"]}
    except ModelFailed as error:
        told = {"error": error.message}
    print(json.dumps(told))
"""

IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
DiffusersEngine(VAEConfig(source="demo"), "cpu").load()  # whatever is imported is imported now
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**20,) * 2)
try:
    DiffusersEngine(VAEConfig(source=sys.argv[1]), "cpu").load()
except ModelFailed as error:
    print(error.message)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_vae("sd", folder / "whole")
    save_tiny_vae("sd", folder / "pipeline" / "vae")
    (folder / "whole" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not asked for")
    tiny_vae("sd").save_pretrained(folder / "sharded", max_shard_size="50KB")
    tiny_vae("sd").save_pretrained(folder / "pickled", safe_serialization=False)
    (folder / "empty").mkdir()
    (folder / "empty" / "README.md").write_text("nothing here")
    with fake_hub() as running:
        running.folders = {f"org/{path.name}": path for path in folder.iterdir()}
        running.refusals = {
            "org/gated": (403, "GatedRepo"),
            "org/private": (401, "RepoNotFound"),
            "org/token": (401, ""),
            "org/broken": (500, ""),
        }
        yield running


def fetched(hub_url: str, home: Path, *sources: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each source, one after another in one process."""
    environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sources)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    "arguments",
    [{"source": "org/whole"}, {"source": "org/pipeline", "subfolder": "vae"}, {"source": "org/sharded"},
     {"source": "org/whole", "revision": COMMIT}],
    ids=["at the top", "in a subfolder", "in shards", "at a commit"],
)  # fmt: skip
def test_what_is_needed_is_downloaded_once_and_then_needs_no_network(
    hub: FakeHub, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    [first] = fetched(hub.url, tmp_path, arguments)
    assert (first["class"], first["revision"]) == ("AutoencoderKL", COMMIT)
    names = {path.name for path in Path(first["folder"]).iterdir()}
    assert names <= {name.split("/")[-1] for name in hub.files(arguments["source"])} - {
        "diffusion_pytorch_model.fp16.safetensors"
    }
    hub.requests.clear()
    assert fetched("http://127.0.0.1:9", tmp_path, arguments) == [first]
    assert not hub.requests


REASONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"source": "org/nowhere"}, ["no model org/nowhere", "HF_TOKEN"]),
    ({"source": "org/private"}, ["private", "HF_TOKEN", "secret"]),
    ({"source": "org/token"}, ["is the token right", "HF_TOKEN"]),
    ({"source": "org/gated"}, ["gated", "accept its terms", "HF_TOKEN"]),
    ({"source": "org/whole", "revision": "v9"}, ["no revision 'v9'"]),
    ({"source": "org/pipeline"}, ["no config.json", "subfolder"]),
    ({"source": "org/empty"}, ["no config.json"]),
    ({"source": "org/pickled"}, ["no safetensors", "diffusion_pytorch_model.bin", "never loaded"]),
    ({"source": "org/whole", "variant": "bf16"}, ["diffusion_pytorch_model.bf16.safetensors"]),
    ({"source": "org/broken"}, ["The Hub answered", "500"]),
    ({"source": "what is this"}, ["owner/name"]),
]


@pytest.fixture(scope="module")
def refused(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A cache, and what was said of each of the sources, none of which it then holds."""
    home = tmp_path_factory.mktemp("cache")
    return home, fetched(hub.url, home, *(arguments for arguments, _ in REASONS))


@pytest.mark.parametrize("number", range(len(REASONS)), ids=[arguments["source"] for arguments, _ in REASONS])
def test_the_reason_tells_the_failures_apart(refused: tuple[Path, list[dict[str, Any]]], number: int) -> None:
    home, told = refused
    for words in REASONS[number][1]:
        assert words in told[number]["error"]
    assert not list(home.rglob("*.bin"))


def test_a_hub_that_nobody_answers_for_is_said_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    [told] = fetched(f"http://127.0.0.1:{free_port()}", tmp_path, {"source": "org/whole"})
    error = told["error"]
    assert "cannot be reached" in error
    assert "remote-vae-serve fetch" in error
    assert time.monotonic() - started < stretched(15)


def test_a_full_disk_is_said_to_be_full(hub: FakeHub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a full disk needs a file system of its own, and mounting one is not allowed here")
    try:
        [told] = fetched(hub.url, disk, {"source": "org/whole"})
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "disk is full" in told["error"]
    assert "HF_HOME" in told["error"]


def test_a_folder_is_used_where_it_lies_and_the_demo_is_bundled(tmp_path: Path) -> None:
    save_tiny_vae("sd", tmp_path / "vae")
    assert fetch(VAEConfig(source=str(tmp_path), subfolder="vae")).folder == tmp_path / "vae"
    assert fetch(VAEConfig(source="demo")).folder == DEMO
    with pytest.raises(ModelFailed, match="does not exist"):
        fetch(VAEConfig(source=str(tmp_path / "typo")))
    with pytest.raises(ModelFailed, match=r"no config\.json"):
        fetch(VAEConfig(source=str(tmp_path)))


def test_weights_that_do_not_fit_in_memory_are_said_not_to(tmp_path: Path) -> None:
    AutoencoderKL(**KL | {"block_out_channels": (64, 128, 256, 256), "norm_num_groups": 32}).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "out of memory on cpu" in run.stdout, run.stdout + run.stderr
