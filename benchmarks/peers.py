"""The peers: other ways to do the same job, each a server of its own: `python -m benchmarks.peers <which> --port ... --job ...`.

bare: uvicorn alone, which reads the body and answers with bytes it has ready: the floor of HTTP, on uvloop and httptools.
fastapi: FastAPI, diffusers and Pillow in one process, one request at a time: the original endpoint's way.
litserve: a LitServe server at its best here: raw bytes both ways (its default is JSON), one worker, its fast queue.
loop: no server: the job in a loop, as fast as it goes; writes jobs a second.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from typing import Any

import uvicorn

Job = Callable[[list[int], bytes], tuple[bytes, str]]
"""The latents' shape and bytes to a body and its Content-Type."""


def job_of(spec: dict[str, Any]) -> Job:
    """The job as one would write it by hand: diffusers' own steps, and Pillow's codecs.

    Args:
        spec: `threads`; `folder` of a model, or `pixels` (height, width) of what a made-up one hands over after `seconds`;
            `output`: raw, jpg or png.
    """
    import numpy as np
    import torch
    from diffusers import AutoencoderTiny
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    torch.set_num_threads(spec["threads"])
    processor = VaeImageProcessor()
    if folder := spec.get("folder"):
        vae = AutoencoderTiny.from_pretrained(folder).eval()
    else:
        from remote_vae_serve.fake import picture

        ready = picture(*spec["pixels"])[0].numpy()

    def decode(shape: list[int], body: bytes) -> Any:
        latents = torch.from_numpy(np.frombuffer(body, np.float32).reshape(shape).copy())
        if folder:
            with torch.inference_mode():
                pixels = vae.decode(latents).sample
            return processor.postprocess(pixels, output_type="pil")[0]
        time.sleep(spec["seconds"])
        return ready if spec["output"] == "raw" else Image.fromarray(ready)

    def job(shape: list[int], body: bytes) -> tuple[bytes, str]:
        picture = decode(shape, body)
        if spec["output"] == "raw":
            return picture.tobytes(), "tensor/binary"
        file = io.BytesIO()
        if spec["output"] == "jpg":
            picture.save(file, "JPEG", quality=90)
        else:
            picture.save(file, "PNG")
        return file.getvalue(), f"image/{spec['output']}"

    return job


def bare(spec: dict[str, Any], port: int) -> None:
    length = spec["pixels"][0] * spec["pixels"][1] * 3
    answer = bytes(length)
    headers = [(b"content-type", b"tensor/binary"), (b"content-length", str(length).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    _uvicorn(app, port, lifespan="off")


def fastapi(spec: dict[str, Any], port: int) -> None:
    from fastapi import FastAPI, Request, Response

    app, job = FastAPI(), job_of(spec)

    async def decode(request: Request) -> Response:
        shape = [int(size) for size in request.query_params.getlist("shape")]
        content, media_type = job(shape, await request.body())
        return Response(content, media_type=media_type)

    # By hand: FastAPI would look the annotations, which are strings here, up among the module's names.
    decode.__annotations__ = {"request": Request, "return": Response}
    app.post("/decode", response_model=None)(decode)
    _uvicorn(app, port)


def litserve(spec: dict[str, Any], port: int) -> None:
    from benchmarks.litserve_peer import run

    run(spec, port)


def loop(spec: dict[str, Any], _: int) -> None:
    job, body = job_of(spec), bytes(4 * _size(spec["shape"]))
    for _ in range(3):
        job(spec["shape"], body)
    done, began = 0, time.perf_counter()
    while (wall := time.perf_counter() - began) < spec["run_s"]:
        job(spec["shape"], body)
        done += 1
    print(json.dumps({"rate": done / wall}))


def _size(shape: list[int]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _uvicorn(app: Any, port: int, **options: Any) -> None:
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="error",
        **options,
    )


PEERS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "bare": bare, "fastapi": fastapi, "litserve": litserve, "loop": loop,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=PEERS)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--job", type=json.loads, required=True)
    args = parser.parse_args()
    PEERS[args.which](args.job, args.port)


if __name__ == "__main__":
    main()
