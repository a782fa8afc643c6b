"""The JavaScript client in Node: its own tests against our HTTP app, with tokens; and what it repeats of the protocol."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from in_process import InProcess, diffusers_engine, pipeline_of
from js_client import FOLDER, MODULE, check_in_node, needs_node
from limits import WAIT_S
from remote_vae.protocol import decode_request, encode_request
from remote_vae.protocol.wire import SHAPE
from remote_vae_serve.http.app import create_app
from remote_vae_serve.middleware import settings
from remote_vae_serve.proxy import guarded
from samples import save_tiny_vae
from served import served

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@needs_node
def test_it_makes_of_a_real_server_what_the_python_client_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.TOKENS, "s3cret/of-the-test")
    pipeline = pipeline_of(diffusers_engine(save_tiny_vae("sd", tmp_path / "weights")), "sd")
    with served(guarded(create_app(InProcess(sd=pipeline.answer), 2**26, 60.0))) as url:
        check_in_node(url.replace("//", "//:s3cret%2Fof-the-test@") + "/sd", tmp_path)
    pipeline.close()


@needs_node
def test_it_knows_the_parameters_that_the_server_reads_and_its_types_do_too() -> None:
    code = f"import * as it from {json.dumps(str(MODULE))};" + (
        "console.log(JSON.stringify([it.DECODE_PARAMETERS, it.ENCODE_PARAMETERS]))"
    )
    run = subprocess.run(["node", "--input-type=module", "-e", code], capture_output=True, text=True, check=True)
    types = (FOLDER / "remote_vae.d.ts").read_text()
    for known, request in zip(json.loads(run.stdout), (decode_request, encode_request), strict=True):
        assert set(known) == {one.name for one in request.PARAMETERS} - {SHAPE.name, request.DTYPE.name}
        for name in known:
            option = re.sub("_(.)", lambda letter: letter[1].upper(), name)
            assert re.search(rf"\b{option}\?:", types), option


def test_its_version_is_that_of_the_package() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert json.loads((FOLDER / "package.json").read_text())["version"] == version[1]


def examples(language: str, word: str) -> str:
    """The example of docs/clients.md in which the word stands."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (example,) = [one for one in found if word in one]
    return str(example)


@needs_node
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_examples_of_the_page_bring_the_picture_back(tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path)
    shutil.copy(ROOT / "deployments" / "remote_vae_serve" / "demo" / "picture.png", tmp_path)
    pipeline = pipeline_of(diffusers_engine(Path("demo")), "demo")
    with served(guarded(create_app(InProcess(demo=pipeline.answer), 2**26, 60.0))) as url:
        for language, word, command in (
            ("sh", "curl", ["sh", "-e"]),
            ("js", "node:fs", ["node", "--input-type=module"]),
        ):
            example = examples(language, word).replace("http://127.0.0.1:8000", url)
            subprocess.run(command, input=example, text=True, cwd=tmp_path, check=True, timeout=WAIT_S)
            with Image.open(tmp_path / "again.png") as again, Image.open(tmp_path / "picture.png") as picture:
                difference = np.abs(np.asarray(again, float) - np.asarray(picture.convert("RGB"), float))
            assert difference.mean() < 10  # of 255: what the demo model loses
            (tmp_path / "again.png").unlink()
    pipeline.close()
