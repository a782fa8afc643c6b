"""Bad input against the whole service in this process, less Ray: each gets the right answer, and the next good request too."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from in_process import InProcess, fake_engine, pipeline_of
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.http.app import create_app
from samples import latents

MAX_BODY = 1 << 16
Z = latents(1, 4, 8, 8).numpy()
GOOD = {"shape": ["1", "4", "8", "8"], "dtype": "float32", "output_type": "pil", "image_format": "png"}


def of_shape(*shape: int, dtype: str = "float32", **query: Any) -> dict[str, Any]:
    """Latents of that shape with the right number of bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return {"query": {"shape": [str(axis) for axis in shape], "dtype": dtype} | query, "body": b"\0" * size}


def says(**query: Any) -> dict[str, Any]:
    return {"query": query}


def in_base64(body: bytes | dict[str, Any] | list[Any]) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"body": content, "headers": {"content-type": "tensor/base64"}}


def with_number(number: float) -> dict[str, Any]:
    z = Z.copy()
    z[0, 1, 2, 3] = number
    return {"body": z.tobytes()}


def chunked(size: int) -> Iterator[bytes]:
    for _ in range(size // 1024):
        yield b"\0" * 1024


# What is changed of a good request | the parameter that is named, in its field and in the sentence
BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "a byte too few": ({"body": Z.tobytes()[:-1]}, "shape"),
    "a byte too many": ({"body": Z.tobytes() + b"\0"}, "shape"),
    "no body": ({"body": b""}, "shape"),
    "no shape": (says(shape=None), "shape"),
    "empty shape": (says(shape=""), "shape"),
    "an empty list": (says(shape="[]"), "shape"),
    "shape in words": (says(shape="one,four,eight,eight"), "shape"),
    "shape in fractions": (says(shape="1,4,8.0,8"), "shape"),
    "nested shape": (says(shape="[[1,4],[8,8]]"), "shape"),
    "zero in shape": (says(shape=["0", "4", "8", "8"]), "shape"),
    "nothing with zero in shape": ({"query": {"shape": ["0", "4", "8", "8"]}, "body": b""}, "shape"),
    "negative shape": (says(shape=["-1", "4", "8", "-8"]), "shape"),
    "overflowing shape": (says(shape=[str(2**62)] * 4), "shape"),
    "wrapping shape": (says(shape=[str(2**32 + 1), "4", "8", "8"]), "shape"),
    "astronomic shape": (says(shape=["9" * 4000] * 4), "shape"),
    "a number too long to read": (says(shape="9" * 5000), "shape"),
    "ten thousand axes": (says(shape=",".join(["1"] * 10_000)), "shape"),
    "no dtype": (says(dtype=None), "dtype"),
    "unknown dtype": (says(dtype="float8"), "dtype"),
    "a dtype that is a novel": (says(dtype="x" * 5000), "dtype"),
    "dtype of torch": (says(dtype="torch.float64"), "dtype"),
    "dtype that is no latent": (of_shape(1, 4, 8, 8, dtype="uint8"), "dtype"),
    "three channels": (of_shape(1, 3, 8, 8), "shape"),
    "sixteen channels": (of_shape(1, 16, 4, 4), "shape"),
    "channels last": (of_shape(1, 8, 8, 4), "shape"),
    "one axis": (of_shape(256), "shape"),
    "two axes": (of_shape(4, 64), "shape"),
    "six axes": (of_shape(1, 1, 4, 1, 8, 8), "shape"),
    "video of three channels": (of_shape(1, 3, 2, 8, 8, output_type="pt"), "shape"),
    "packed without a size": (of_shape(1, 16, 16), "height"),
    "packed without height": (of_shape(1, 16, 16, width="64"), "height"),
    "packed without width": (of_shape(1, 16, 16, height="64"), "width"),
    "packed with a wrong size": (of_shape(1, 16, 16, height="64", width="128"), "height"),
    "packed with a huge size": (of_shape(1, 16, 16, height="1048576", width="1048576"), "height"),
    "packed with wide tokens": (of_shape(1, 16, 64, height="64", width="64"), "shape"),
    "no height at all": (says(height="0", width="64"), "height"),
    "negative width": (says(height="64", width="-64"), "width"),
    "height beyond reason": (says(height=str(2**40), width="64"), "height"),
    "two heights": (says(height=["64", "64"], width="64"), "height"),
    "height in words": (says(height="tall"), "height"),
    "empty height": (says(height=""), "height"),
    "unknown output type": (says(output_type="gif"), "output_type"),
    "mp4 of an image": (says(output_type="mp4"), "output_type"),
    "an image of a video": (of_shape(1, 4, 2, 8, 8), "output_type"),
    "one image of a batch": (of_shape(2, 4, 8, 8), "shape"),
    "one image of a packed batch": (of_shape(2, 16, 16, height="64", width="64"), "shape"),
    "frames of two videos": (of_shape(2, 4, 2, 8, 8, output_type="pt", partial_postprocess="true"), "shape"),
    "image format gif": (says(image_format="gif"), "image_format"),
    "empty image format": (says(image_format=""), "image_format"),
    "scaling factor zero": (says(scaling_factor="0"), "scaling_factor"),
    "scaling factor minus zero": (says(scaling_factor="-0.0"), "scaling_factor"),
    "scaling factor NaN": (says(scaling_factor="nan"), "scaling_factor"),
    "scaling factor infinite": (says(scaling_factor="inf"), "scaling_factor"),
    "scaling factor overflowing": (says(scaling_factor="1e999"), "scaling_factor"),
    "scaling factor in words": (says(scaling_factor="small"), "scaling_factor"),
    "scaling factor None": (says(scaling_factor="None"), "scaling_factor"),
    "shift factor NaN": (says(shift_factor="NaN"), "shift_factor"),
    "shift factor infinite": (says(shift_factor="-Infinity"), "shift_factor"),
    "do_scaling maybe": (says(do_scaling="maybe"), "do_scaling"),
    "do_scaling empty": (says(do_scaling=""), "do_scaling"),
    "partial_postprocess two": (says(partial_postprocess="2"), "partial_postprocess"),
    "fps zero": (says(fps="0"), "fps"),
    "fps NaN": (says(fps="nan"), "fps"),
    "fps infinite": (says(fps="inf"), "fps"),
    "fps in words": (says(fps="fast"), "fps"),
    "base64 that is none": (in_base64({"inputs": "not base64!"}), "inputs"),
    "base64 of letters from elsewhere": (in_base64({"inputs": "äöü="}), "inputs"),
    "base64 without padding": (in_base64({"inputs": "AAAAA"}), "inputs"),
    "base64 of nothing": (in_base64({"inputs": None}), "inputs"),
    "base64 of a list": (in_base64({"inputs": [1, 2]}), "inputs"),
    "base64 in a list": (in_base64(["AAAA"]), "inputs"),
    "JSON without inputs": (in_base64({"input": "AAAA"}), "inputs"),
    "JSON that is none": (in_base64(b"{'inputs': 1}"), "inputs"),
    "JSON that is no text": (in_base64(b"\xff\xfe\x00"), "inputs"),
    "JSON without end": (in_base64(b"[" * 60_000), "inputs"),
    "base64 of a byte too few": (in_base64({"inputs": base64.b64encode(Z.tobytes()[:-1]).decode()}), "shape"),
    "NaN in the latents": (with_number(float("nan")), "tensor"),
    "infinity in the latents": (with_number(float("-inf")), "tensor"),
}

# What is changed of a good request | status | code | what the sentence names | the parameter's field
OTHERS: dict[str, tuple[dict[str, Any], int, str, str, str | None]] = {
    "an unknown model": ({"path": "/nobody"}, 404, "unknown_model", "nobody", "model"),
    "a model in capitals": ({"path": "/FAKE"}, 404, "unknown_model", "FAKE", "model"),
    "a climbing path": ({"path": "/%2e%2e"}, 404, "unknown_model", "..", "model"),
    "a path that climbs far": ({"path": "/%2e%2e%2f%2e%2e%2fetc%2fpasswd"}, 404, "unknown_route", "/etc/passwd", None),
    "a path into a model": ({"path": "/fake/%2e%2e%2fhealth"}, 404, "unknown_route", "health", None),
    "a path with a zero byte": ({"path": "/fake%00"}, 404, "unknown_model", "fake", "model"),
    "a path that is no text": ({"path": "/%ff%fe"}, 404, "unknown_model", "model", "model"),
    "a very long path": ({"path": "/" + "x" * 5000}, 404, "unknown_model", "xxx", "model"),
    "a very long route": ({"path": "/fake/" + "x" * 5000}, 404, "unknown_route", "/fake/xxx", None),
    "a route that is not there": ({"path": "/fake/train"}, 404, "unknown_route", "/fake/train", None),
    "PUT": ({"method": "PUT"}, 405, "wrong_method", "PUT", None),
    "DELETE": ({"method": "DELETE"}, 405, "wrong_method", "DELETE", None),
    "OPTIONS": ({"method": "OPTIONS"}, 405, "wrong_method", "OPTIONS", None),
    "a method of their own": ({"method": "BREW"}, 405, "wrong_method", "BREW", None),
    "GET of decode": ({"method": "GET", "path": "/fake/decode"}, 405, "wrong_method", "GET", None),
    "a body over the limit": ({"body": b"\0" * (MAX_BODY + 1)}, 413, "body_too_large", str(MAX_BODY), "body"),
    "a body over the limit in pieces": ({"body": chunked(2 * MAX_BODY)}, 413, "body_too_large", str(MAX_BODY), "body"),
    **{
        f"a body of {media}": (
            {"headers": {"content-type": media}}, 415, "unknown_content_type", media.partition(";")[0], "content-type",
        )
        for media in ("text/html", "text/plain; charset=utf-8", "multipart/form-data; boundary=x",
                      "application/x-www-form-urlencoded", "application/pickle", "tensor/", "*/*")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    pipeline = pipeline_of(fake_engine(), "fake")
    yield TestClient(create_app(InProcess(fake=pipeline.decode), MAX_BODY, 10.0), follow_redirects=False)
    pipeline.close()


def send(client: TestClient, change: dict[str, Any]) -> Any:
    query = {name: value for name, value in (GOOD | change.get("query", {})).items() if value is not None}
    return client.request(
        change.get("method", "POST"),
        change.get("path", "/fake"),
        params=query,
        headers={"content-type": "tensor/binary", "accept": "image/png"} | change.get("headers", {}),
        content=change.get("body", Z.tobytes()),
    )


def assert_it_still_works(client: TestClient) -> None:
    """A good request gets the pixels it would have got before."""
    query, headers, body = DecodeRequest(from_array(Z), output=Output.UINT8).to_http()
    answer = client.post("/fake", params=query, headers=headers, content=bytes(body))
    assert answer.status_code == 200
    pixels = np.frombuffer(answer.content, np.uint8).reshape(json.loads(answer.headers["shape"]))
    grey = np.clip(Z[0, 0] / 2 + 0.5, 0, 1).repeat(8, 0).repeat(8, 1) * 255
    np.testing.assert_allclose(pixels[0], np.stack([grey] * 3, -1), atol=0.51)


def assert_refused(answer: Any, status: int, code: str, named: str, parameter: str | None) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    fields = answer.json()
    assert set(fields) == {"error", "code", "request_id"} | ({"parameter"} if parameter else set())
    assert (fields["code"], fields.get("parameter")) == (code, parameter)
    assert named.lower() in fields["error"].lower()
    assert fields["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert len(answer.content) < 2000  # what came in does not all go out again


# The sentence speaks of these in words of its own.
IN_OTHER_WORDS = {
    "packed with wide tokens": "values a token",
    "one image of a batch": "the batch has 2",
    "one image of a packed batch": "the batch has 2",
    "frames of two videos": "the batch has 2",
    "NaN in the latents": "NaN or infinity",
    "infinity in the latents": "NaN or infinity",
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_a_400_that_names_the_parameter_and_harms_nobody(client: TestClient, name: str) -> None:
    change, parameter = BAD_REQUESTS[name]
    assert_refused(send(client, change), 400, "bad_request", IN_OTHER_WORDS.get(name, parameter), parameter)
    assert_it_still_works(client)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_served_is_answered_in_the_same_form_and_harms_nobody(client: TestClient, name: str) -> None:
    change, status, code, named, parameter = OTHERS[name]
    assert_refused(send(client, change), status, code, named, parameter)
    assert_it_still_works(client)


def test_the_good_request_that_the_bad_ones_are_made_of_is_good(client: TestClient) -> None:
    """Otherwise each of them could be refused for a reason that is not its own."""
    answer = send(client, {})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    for shape, query in (((1, 4, 8, 8), {}), ((4, 8, 8), {}), ((1, 16, 16), {"height": "64", "width": "64"})):
        assert send(client, of_shape(*shape, **query)).status_code == 200
    assert send(client, of_shape(1, 4, 2, 8, 8, output_type="pt")).status_code == 200
    assert send(client, in_base64({"inputs": base64.b64encode(Z.tobytes()).decode()})).status_code == 200
