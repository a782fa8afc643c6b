"""A model all of whose pictures are made in tiles, slowly, so that a test can come in the middle of one."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from in_process import InProcess, diffusers_engine, pipeline_of
from limits import WAIT_S
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.tiling import TilingPlan
from remote_vae_serve.http.app import create_app
from samples import latents
from served import served

TILE_S = 0.05
PLAN = TilingPlan(32)
LARGE, SMALL = latents(1, 4, 16, 16), latents(1, 4, 4, 4)
TILES = {LARGE.shape: 36, SMALL.shape: 4}
"""Of their pictures."""
MIDDLE = 3
"""Tiles after which a test comes."""
A_FEW = 3
"""Tiles that may begin between a client's going and the device's hearing of it, on a machine that has much else to do."""


class TiledModel:
    """A tiny Stable Diffusion autoencoder in a replica's pipeline.

    Attributes:
        began: tiles that were, of decodes and encodes.
        made: what they gave, weakly.
    """

    def __init__(self, weights: Path, **arguments: Any) -> None:
        self.engine = diffusers_engine(weights / "sd", **arguments)
        self.engine.plan_decode = lambda shape, hints=None: PLAN  # type: ignore[assignment, method-assign]
        self.engine.plan_encode = lambda shape: PLAN  # type: ignore[method-assign]
        self.pipeline = pipeline_of(self.engine)
        self.began = 0
        self.made: list[weakref.ref[torch.Tensor]] = []
        model = self.engine._model(torch.float32)
        for part in (model.decoder, model.encoder):
            part.register_forward_hook(self._tile)

    def _tile(self, part: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
        self.began += 1
        self.made.append(weakref.ref(made))
        time.sleep(TILE_S)

    def wait_until_in_the_middle(self) -> None:
        give_up = time.monotonic() + WAIT_S
        while self.began < MIDDLE:
            assert time.monotonic() < give_up
            time.sleep(TILE_S / 10)

    def small(self) -> torch.Tensor:
        """What a small request gets, once the device is free for it."""
        return to_torch(asyncio.run(self.pipeline.decode(decode_request(SMALL))).tensor)

    def alone(self) -> torch.Tensor:
        """The same as the engine makes it, with nobody before it."""
        pixels = self.engine.decode(SMALL, PLAN).pixels
        self.began = 0
        self.made.clear()
        return pixels


@contextmanager
def tiled_model(weights: Path, **arguments: Any) -> Iterator[TiledModel]:
    threads = torch.get_num_threads()
    model = TiledModel(weights, **arguments)
    try:
        yield model
    finally:
        model.pipeline.close()
        torch.set_num_threads(threads)


@contextmanager
def over_http(model: TiledModel) -> Iterator[str]:
    """The URL of the model."""
    with served(create_app(InProcess(model=model.pipeline.answer), 1 << 20, WAIT_S)) as url:
        yield f"{url}/model"


def decode_request(z: torch.Tensor, **fields: Any) -> DecodeRequest:
    return DecodeRequest(from_array(z), output=Output.PT, **fields)
