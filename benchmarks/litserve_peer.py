"""The LitServe peer. In a file of its own: LitServe sends the API to its worker process, which finds the class by its module."""

from __future__ import annotations

from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from benchmarks.job import job_of


class API(litserve.LitAPI):  # type: ignore[misc]
    """Raw bytes in, a finished response out: LitServe's defaults, JSON or a form, would cost it more."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(api_path="/decode")
        self._wanted = spec

    def setup(self, device: str) -> None:
        self._job = job_of(self._wanted)

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, body: Any) -> Any:
        return self._job(self._wanted["shape"], body)  # the query does not get as far as here

    def encode_response(self, output: Any) -> Any:
        return Response(output[0], media_type=output[1])


# As an object: LitServe hands the annotation to FastAPI, which would look a string up among LitServe's names.
API.decode_request.__annotations__ = {"request": Annotated[bytes, Body(media_type="application/octet-stream")]}


def run(spec: dict[str, Any], port: int) -> None:
    server = litserve.LitServer(API(spec), accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, log_level="error", access_log=False, generate_client_file=False)
