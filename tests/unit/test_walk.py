"""A request goes through a replica without turning back: how often it may is written here, and `tools/walk.py` shows the way."""

from __future__ import annotations

import numpy as np
import pytest

import walk
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling

MOST_TURNS = 4
PLACES = (
    "replica/pipeline.py",
    "processing/latent_processor.py",
    "replica/device_worker.py",
    "engine/diffusers_engine.py",
)


@pytest.mark.parametrize(
    "request_",
    [
        DecodeRequest(from_array(np.zeros((1, 16, 4, 4), np.float32)), Scaling(own=True)),
        EncodeRequest(from_array(np.zeros((1, 3, 32, 32), np.float32)), Scaling(own=True)),
    ],
    ids=["decode", "encode"],
)
def test_what_travels_turns_back_four_times_at_most(request_: Request) -> None:
    payload, _ = walk.of_demo(request_)
    assert [f"remote_vae_serve/{place}" in payload.stays for place in PLACES] == [True] * 4  # it was seen on its way
    assert len(payload.turns) <= MOST_TURNS, str(payload)
