"""A model's own HTTP side answers at its own path as the ingress answers for it: same parser, same errors, same headers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae_serve.http.app import create_app, create_model_app
from samples import latents, save_tiny_vae

Z = latents(1, 4, 8, 8)
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
CHANGING = {"x-request-id", "server-timing"}


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> tuple[TestClient, TestClient]:
    """The ingress, and the replica where the application hangs at /sd."""
    pipeline = pipeline_of(diffusers_engine(save_tiny_vae("sd", tmp_path_factory.mktemp("sd"))), "sd")
    models = InProcess(sd=pipeline.answer)
    direct = create_model_app("sd", models, 2**20, 30.0)
    return (
        TestClient(create_app(models, 2**20, 30.0), follow_redirects=False),
        TestClient(direct, follow_redirects=False, root_path="/sd"),
    )


@pytest.mark.parametrize(
    ("method", "path", "query", "body"),
    [
        ("POST", "/sd", QUERY, Z.numpy().tobytes()),
        ("POST", "/sd/", QUERY, Z.numpy().tobytes()),
        ("POST", "/sd/decode", QUERY, Z.numpy().tobytes()),
        ("POST", "/sd/decode/", QUERY, Z.numpy().tobytes()),
        ("POST", "/sd/encode", {"shape": [1, 3, 8, 8], "dtype": "float32", "seed": 1}, torch.zeros(192).numpy().tobytes()),
        ("POST", "/sd", {}, b"\x89PNG\r\n\x1a\n and no picture"),
        ("POST", "/sd", QUERY, b"short"),
        ("POST", "/sd", {**QUERY, "dtype": "int3"}, b""),
        ("POST", "/sd", QUERY, bytes(2**20 + 1)),
        ("GET", "/sd", {}, b""),
        ("GET", "/sd/", {}, b""),
        ("POST", "/sd/describe", {}, b""),
        ("GET", "/sd/decode", {}, b""),
        ("PUT", "/sd", {}, b""),
        ("GET", "/sd/a/b", {}, b""),
    ],
)  # fmt: skip
def test_both_doors_give_the_same_answer(
    doors: tuple[TestClient, TestClient], method: str, path: str, query: dict[str, Any], body: bytes
) -> None:
    ingress, direct = (door.request(method, path, params=query, content=body) for door in doors)
    assert ingress.status_code == direct.status_code != 307
    if ingress.is_success:
        assert ingress.content == direct.content
    else:
        ours, theirs = ingress.json(), direct.json()
        assert ours.pop("request_id") != theirs.pop("request_id")
        assert ours == theirs
    assert {k: v for k, v in ingress.headers.items() if k not in CHANGING | {"content-length"}} == {
        k: v for k, v in direct.headers.items() if k not in CHANGING | {"content-length"}
    }
    assert CHANGING & set(ingress.headers) == CHANGING & set(direct.headers)


def test_the_words_of_the_ingress_are_free_where_a_model_is_alone(doors: tuple[TestClient, TestClient]) -> None:
    assert doors[1].get("/sd/health").json() == {"status": "ok", "models": 1}
    assert doors[1].get("/sd/openapi.json").json() == doors[0].get("/openapi.json").json()
    assert doors[1].get("/sd/models").status_code == 404


def test_a_large_reply_comes_whole_in_slices_with_its_length(doors: tuple[TestClient, TestClient]) -> None:
    z = latents(1, 4, 120, 120, seed=3)
    query = {**QUERY, "shape": list(z.shape)}
    answers = [door.post("/sd", params=query, content=z.numpy().tobytes()) for door in doors]
    assert len(answers[0].content) == 3 * 960 * 960 * 4 > 8 * 2**20
    assert answers[0].content == answers[1].content
    assert {answer.headers["content-length"] for answer in answers} == {str(3 * 960 * 960 * 4)}
