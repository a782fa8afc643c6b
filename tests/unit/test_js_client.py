"""The JavaScript client in Node: its own tests against our HTTP app, with tokens; and what it repeats of the protocol."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from in_process import InProcess, diffusers_engine, pipeline_of
from js_client import FOLDER, MODULE, check_in_node, needs_node
from remote_vae.protocol import decode_request, encode_request
from remote_vae.protocol.wire import SHAPE
from remote_vae_serve.http.app import create_app
from remote_vae_serve.middleware import settings
from remote_vae_serve.proxy import guarded
from samples import save_tiny_vae
from served import served

ROOT = Path(__file__).parents[2]


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
