"""Which handle calls are small enough for a gRPC message: by the request, and by what the model can make of it at most."""

from __future__ import annotations

import math

import numpy as np
import pytest

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import RawTensor, announced
from remote_vae.transports.call_size import SMALL_REPLY, CallSize

SD = ModelDescription(latent_channels=4, spatial_ratio=8)
LTX = ModelDescription(latent_channels=128, spatial_ratio=32, temporal_ratio=8)


def of_shape(*shape: int, output: Output = Output.PT, dtype: str = "float16") -> DecodeRequest:
    return DecodeRequest(RawTensor(announced(2 * math.prod(shape)), dtype, shape), output=output)


@pytest.mark.parametrize(
    ("model", "request_", "is_small"),
    [
        (SD, of_shape(1, 4, 16, 16), True),  # 128 x 128 floats, 256 KiB with alpha
        (SD, of_shape(1, 4, 32, 32), True),  # 1 MiB
        (SD, of_shape(1, 4, 32, 33), False),
        (SD, of_shape(1, 4, 32, 32, output=Output.UINT8), True),
        (SD, of_shape(1, 4, 32, 32, output=Output.PNG), True),
        (SD, of_shape(1, 4, 64, 64, output=Output.JPEG), True),
        (SD, of_shape(1, 4, 64, 64, output=Output.UINT8), True),
        (SD, of_shape(1, 4, 64, 65, output=Output.PNG), False),  # of noise it is as large as its pixels
        (SD, of_shape(1, 4, 96, 96, output=Output.JPEG), False),
        (SD, of_shape(4, 4, 32, 32, output=Output.UINT8), True),
        (SD, of_shape(5, 4, 32, 32, output=Output.UINT8), False),
        (LTX, of_shape(1, 128, 1, 4, 4), False),
        (LTX, of_shape(1, 16, 128, output=Output.MP4), True),  # packed: the same number of values
        (SD, EncodeRequest(RawTensor(announced(3 * 128 * 128), "uint8", (128, 128, 3))), True),
        (SD, EncodeRequest(RawTensor(announced(3 * 256 * 256), "uint8", (256, 256, 3))), False),
        (SD, EncodeRequest(np.zeros(100, np.uint8)), False),  # a file: any number of pixels may be in it
    ],
)
def test_what_is_small_is_small_whatever_comes_of_it(
    model: ModelDescription, request_: DecodeRequest | EncodeRequest, is_small: bool
) -> None:
    sizes = CallSize.of(model)
    assert sizes is not None
    assert sizes.is_small(request_) == is_small


def test_no_reply_is_larger_than_it_was_taken_for() -> None:
    """The largest that counts as small, of the decoders with the most pixels a latent: raw floats, all four channels."""
    for model in (SD, LTX):
        sizes = CallSize.of(model)
        assert sizes is not None
        assert model.latent_channels is not None
        side = next(side for side in range(512, 0, -1) if sizes.is_small(of_shape(1, model.latent_channels, 1, side)))
        pixels = side * (model.spatial_ratio or 0) ** 2 * (model.temporal_ratio or 1)
        assert 4 * 4 * pixels <= SMALL_REPLY


@pytest.mark.parametrize("said", [{}, {"latent_channels": 4}, {"spatial_ratio": 8}])
def test_of_a_model_that_does_not_say_nothing_is_small(said: dict[str, int]) -> None:
    assert CallSize.of(ModelDescription(**said)) is None  # type: ignore[arg-type]
