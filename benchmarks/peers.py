"""The peers: other ways to do the same job, each a server of its own: `python -m benchmarks.peers <which> --port ... --job ...`.

bare: uvicorn alone, which reads the body and answers with bytes it has ready: the floor of HTTP, on uvloop and httptools.
fastapi: FastAPI, diffusers and Pillow in one process, one request at a time: the original endpoint's way.
litserve: a LitServe server at its best here: raw bytes both ways (its default is JSON), one worker, its fast queue.
loop: no server: the job in a loop, as fast as it goes; writes jobs a second.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from benchmarks.job import job_of


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
