"""No latent, image or video reaches a disk or a log, whatever happens to its request."""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray
import requests
from PIL import Image

from limits import WAIT_S
from running_cluster import Cluster
from samples import latents

SLICE = 48


def folders() -> list[Path]:
    """Where the server could write: its working and temporary folders, and Ray's, in which its logs are."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return [Path.cwd(), Path(tempfile.gettempdir()), session, session.resolve() / "logs"]


def written_since(moment: float) -> Iterator[Path]:
    for folder in folders():
        for path in folder.rglob("*"):
            try:
                if path.is_file() and path.stat().st_mtime >= moment:
                    yield path
            except OSError:
                continue  # gone again, or a socket of somebody else's


def traces(content: bytes) -> list[bytes]:
    """What would be found of some bytes in a file: as they are, in base64, in hex, as Python writes them."""
    start = (len(content) - SLICE - 33) // 3 * 3  # near the end: an mp4 begins with words that every mp4 of x264 has
    piece = content[start : start + SLICE]
    assert len(set(piece)) > 8, "too plain to be recognised"
    return [
        piece,
        base64.b64encode(content)[start // 3 * 4 :][:SLICE],
        piece.hex().encode(),
        repr(piece)[2:-1].encode(),
    ]


def test_nothing_of_what_was_sent_or_answered_is_written(cluster: Cluster) -> None:
    began = time.time() - 1
    images, video = latents(1, 4, 16, 16, seed=77), latents(1, 4, 3, 4, 6, seed=78)
    pixels = np.random.default_rng(79).integers(0, 255, (64, 64, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    seen: list[bytes] = []

    def post(path: str, body: bytes, status: int, headers: dict[str, str] | None = None, **query: object) -> None:
        answer = requests.post(f"{cluster.url}/{path}", params=query, data=body, headers=headers, timeout=WAIT_S)
        assert answer.status_code == status, answer.text[:300]
        seen.append(body)
        if status == 200:
            seen.append(answer.content)

    z, clip = images.numpy().tobytes(), video.numpy().tobytes()
    shape, of_clip = list(images.shape), list(video.shape)
    tensor = {"accept": "tensor/binary", "content-type": "tensor/binary"}
    post("sd", z, 200, shape=shape, dtype="float32", image_format="png")
    post("sd", z, 200, tensor, shape=shape, dtype="float32", output_type="pt")
    post("hunyuan", clip, 200, shape=of_clip, dtype="float32", output_type="mp4")
    post("sd/encode", picture.getvalue(), 200)
    post("sd/encode", pixels.tobytes(), 200, tensor, shape=[64, 64, 3], dtype="uint8")
    post("sd", z, 400, shape=[1, 5, 16, 16], dtype="float32")
    post("sd", z, 400, shape=[1, 3, 16, 16], dtype="float32")
    post(
        "sd",
        np.where(images.numpy() > 0, np.float32("nan"), images.numpy()).tobytes(),
        400,
        shape=shape,
        dtype="float32",
    )
    post("nobody", z, 404, shape=shape, dtype="float32")
    post("sd/encode", picture.getvalue()[:-400], 400)
    post("sd", z, 504, {"x-vae-deadline-ms": "1"}, shape=shape, dtype="float32")

    with tempfile.NamedTemporaryFile() as control:  # what is to be found is found
        control.write(b"so and so: " + base64.b64encode(z))
        control.flush()
        assert files_with(seen, began) == {Path(control.name)}
    assert not files_with(seen, began)


def files_with(contents: list[bytes], since: float) -> set[Path]:
    """The files, written to since then, in which any of the contents shows."""
    needles = {trace for content in contents for trace in traces(content)}
    found = set()
    for path in set(written_since(since)):
        try:
            content = path.read_bytes() if path.stat().st_size < 2**28 else b""
        except OSError:
            continue
        if any(needle in content for needle in needles):
            found.add(path)
    return found
