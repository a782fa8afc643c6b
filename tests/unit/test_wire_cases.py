"""The table of `wire_cases`: read by the parser alone, and answered by the whole app with real, tiny models."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from starlette.testclient import TestClient

from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae.errors import ModelFailed, ModelStarting, Overloaded, RemoteVAEError
from remote_vae.protocol.request import read_request
from remote_vae_serve.http.app import create_app
from remote_vae_serve.http.openapi import document
from wire_answers import Decodes, Refused, Tells, as_uint8, tensor_of
from wire_case import HOSTS, MAX_BODY, WireCase, Z
from wire_cases import CASES
from wire_clients import today

KINDS = ("sd", "sdxl", "flux", "tiny", "hunyuan")
PARSED = [
    name for name, case in CASES.items() if not isinstance(case.gives, Tells) and getattr(case.gives, "by", "") != "app"
]


async def slow(request: Any) -> Any:
    await asyncio.sleep(30)


def raising(error: Exception) -> Any:
    async def answer(request: Any) -> Any:
        raise error

    return answer


ABSENT = {
    "starting": raising(ModelStarting("starting is being started; try again", retry_after=2)),
    "busy": raising(Overloaded("The queue is full; try again", retry_after=0.2)),
    "failed": raising(ModelFailed("failed has no weights", retry_after=30)),
    "broken": raising(RuntimeError("a secret of the inside")),
    "slow": slow,
}


@pytest.fixture(scope="module")
def app(weights: Path) -> Iterator[TestClient]:
    pipelines = {kind: pipeline_of(diffusers_engine(weights / kind), kind) for kind in KINDS}
    models = InProcess(**{kind: pipeline.answer for kind, pipeline in pipelines.items()}, **ABSENT)
    yield TestClient(create_app(models, MAX_BODY, 20.0, HOSTS), follow_redirects=False)
    for pipeline in pipelines.values():
        pipeline.close()


def send(app: TestClient, case: WireCase) -> Any:
    request = app.build_request(
        case.method, case.path, params=list(case.sent.query), headers=case.sent.headers, content=case.sent.body or None
    )
    # The test's own client adds what was not sent.
    for name in ("accept", "user-agent", "accept-encoding", "connection"):
        if name not in case.sent.headers and name in request.headers:
            del request.headers[name]
    return app.send(request, follow_redirects=False)


@pytest.mark.parametrize("name", PARSED)
def test_the_parser_reads_what_each_client_says(name: str) -> None:
    case = CASES[name]

    def read() -> Any:
        return read_request(case.verb, case.sent.query, case.sent.headers, bytearray(case.sent.body))

    if isinstance(case.gives, Refused) and case.gives.by == "parser":
        with pytest.raises(RemoteVAEError) as caught:
            read()
        case.gives.check_parsed(caught.value)
    elif isinstance(case.gives, Refused):
        read()  # the parser knows no model, and has nothing against it
    else:
        case.gives.check_parsed(read())


@pytest.mark.parametrize("name", CASES)
def test_every_client_gets_what_it_is_owed(app: TestClient, name: str) -> None:
    case = CASES[name]
    answer = send(app, case)
    assert not answer.is_redirect
    case.gives.check(answer, case.answered_by)
    if "x-request-id" not in case.sent.headers:  # else Serve's proxy writes it on the answer itself
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    if isinstance(case.gives, Refused):
        jsonschema.validate(answer.json(), document()["components"]["schemas"]["Error"])
        assert "secret" not in answer.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_png_is_the_pt_reply_rounded_in_the_decoders_dtype_and_half_to_even(
    weights: Path, tmp_path: Path, dtype: str
) -> None:
    """As diffusers rounds it; and `pt` and the signature say what the model ran in."""
    folder = shutil.copytree(weights / "sdxl", tmp_path / "sdxl")
    config = json.loads((folder / "config.json").read_text()) | {"force_upcast": False}
    (folder / "config.json").write_text(json.dumps(config))
    pipeline = pipeline_of(diffusers_engine(folder, dtype=dtype), "sdxl")
    app = TestClient(create_app(InProcess(sdxl=pipeline.answer), MAX_BODY, 20.0))
    pt, png, unit, uint8 = (
        app.post("/sdxl", params=list(sent.query), headers=sent.headers, content=sent.body)
        for sent in (today(Z, **arguments) for arguments in (
            {"output_type": "pt"}, {"image_format": "png"}, {"processor": object()},
            {"output_type": "pt", "partial_postprocess": True}))
    )  # fmt: skip
    pipeline.close()
    pixels = tensor_of(pt)
    assert str(pixels.dtype) == f"torch.{dtype}"
    assert {answer.headers["x-vae-dtype"] for answer in (pt, png, unit, uint8)} == {dtype}
    assert torch.equal(tensor_of(unit), VaeImageProcessor().postprocess(pixels, output_type="pt"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png.content))), as_uint8(pixels)[0])
    np.testing.assert_array_equal(tensor_of(uint8).numpy(), as_uint8(pixels))


def test_the_table_has_every_client_and_every_kind_of_model() -> None:
    for client in (
        "v0 blog", "SD.Next v0 week", "v1 helper base64", "v1 helper binary", "today's helper", "SD.Next raw", "SD.Next png",
        "SD.Next jpg", "ComfyUI HF-nodes image", "ComfyUI video (5-D", "sampler grid", "urllib, shape last",
        "diffusers remote_encode PNG", "diffusers remote_encode tensor", "curl", "ours",
    ):  # fmt: skip
        assert any(name.startswith(client) for name in CASES), client
    decoding = [case for case in CASES.values() if isinstance(case.gives, Decodes)]
    assert {case.answered_by for case in decoding} == set(KINDS)
    assert {case.gives.form for case in decoding} == {"jpg", "png", "unit", "pt", "uint8", "mp4"}  # type: ignore[union-attr]
    assert {case.gives.status for case in CASES.values()} >= {200, 400, 404, 405, 413, 415, 500, 503, 504}
