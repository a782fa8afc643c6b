"""The README's commands and examples, run as they stand but for the address, one model's name and a folder to write to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ray import serve

from remote_vae_serve.config import VAEConfig
from running_cluster import Cluster
from samples import save_tiny_vae

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def models(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The models the README uses; random weights of the right kind."""
    sources = {
        "hunyuan-video": str(save_tiny_vae("hunyuan16", tmp_path_factory.mktemp("hunyuan"))),
        "demo": "demo",
    }
    for name, source in sources.items():
        cluster.begin(name, source=source, device="cpu")
    for name in sources:
        cluster.wait_until_known(name)
    yield cluster
    for name in sources:
        serve.delete(name)


@pytest.mark.slow
def test_the_examples_run_one_after_the_other(models: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"serve": serve}
    for example in blocks("python"):
        code = example.replace("http://127.0.0.1:8000", models.url).replace("sd-v1", "sd")
        exec(compile(code, "README.md", "exec"), names)
        assert isinstance(names["image"], Image.Image)
    assert names["latent"].shape == (1, 4, 64, 64)
    assert {path.name for path in tmp_path.iterdir()} == {
        "test.jpg",
        "video.mp4",
        "queued.jpg",
        "0.jpg",
        "1.jpg",
        "2.jpg",
    }


@pytest.mark.slow
def test_the_curl_command_brings_a_picture(models: Cluster, tmp_path: Path) -> None:
    (command,) = [block for block in blocks("sh") if "curl" in block]
    subprocess.run(command.replace("http://127.0.0.1:8000", models.url), shell=True, cwd=tmp_path, check=True)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (128, 128)


def test_the_make_targets_it_names_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)) <= set(targets)


def test_its_application_is_valid() -> None:
    (example,) = blocks("yaml")
    (application,) = yaml.safe_load(example)
    VAEConfig(**application["args"])
