"""A real engine behind the HTTP app in this process, whose live bytes and events are counted."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from in_process import InProcess, diffusers_engine, pipeline_of
from limits import WAIT_S
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.memory.estimate import LiveBytes
from remote_vae_serve.http.app import create_app
from remote_vae_serve.replica.device_job import Job


class OneModel:
    """Named `model`.

    Args:
        free: bytes that are left for work; None leaves the budget as it is.
        arguments: of `VAEConfig`.

    Attributes:
        live: of what the device's thread made, since its start.
        events: what an operator would count.
    """

    def __init__(self, folder: Path, free: int | None = None, **arguments: Any) -> None:
        self.live, self.events = LiveBytes(), Counter[str]()
        self.engine = diffusers_engine(folder, **arguments)
        self.engine.on_event = lambda event: self.events.update([event])
        self.engine.on_device = lambda: self.live  # type: ignore[method-assign]
        if free is not None:
            self.set_free(free)
        self.pipeline = pipeline_of(self.engine)
        self.app = create_app(InProcess(model=self.pipeline.answer), 1 << 28, 120)
        self._client = TestClient(self.app)

    def set_free(self, count: int) -> None:
        """Give the replica so many bytes for work, beside the weights that it has loaded."""
        self.engine.planner.budget += count - self.engine.planner.free

    def close(self) -> None:
        self.pipeline.close()

    def post(self, z: torch.Tensor, output: Output = Output.PT) -> Any:
        query, headers, body = DecodeRequest(from_array(z), output=output).to_http()
        return self._client.post("/model", params=query, headers=headers, content=bytes(body))

    def together(self, latents: Sequence[torch.Tensor], output: Output = Output.PT) -> list[Any]:
        """Results or errors of requests that ran as one batch: the device is held until all of them wait for it."""
        device, held, go = self.pipeline._worker, threading.Event(), threading.Event()

        def hold(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
            held.set()
            assert go.wait(WAIT_S)
            return batch, None

        async def ask() -> list[Any]:
            tasks = [
                asyncio.create_task(self.pipeline.decode(DecodeRequest(from_array(z), output=output))) for z in latents
            ]
            while len(device._waiting) < len(tasks):
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.005)
            go.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        device.submit(Job(torch.zeros(1), hold, lambda part: None))
        assert held.wait(WAIT_S)
        return asyncio.run(ask())

    def decode(self, z: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The pixels, and what they were computed in."""
        answer = self.post(z)
        assert answer.status_code == 200, answer.text
        return pixels_of(answer), answer.headers["x-vae-dtype"]


def pixels_of(answer: Any) -> torch.Tensor:
    """Those of an HTTP answer that is a tensor."""
    return to_torch(Result.from_http(answer.headers, answer.content).tensor)
