"""`CallSize`: how large a handle call is, request and reply, before it is made: small ones go by value, in a gRPC message, large
ones by reference, through Ray's object store.

A small call by value takes half the time, and a message above 4 MiB is refused. Measured on two cores with Ray Serve 2.60, of
requests of 64 KiB: replies of 300 KiB 2.8 ms by value and 4.8 by reference, eight at a time 442 and 238 a second; of 768 KiB 4.0
and 7.0 ms; of 1 MiB 4.4 and 5.2; of 1.5 MiB 10.3 and 7.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.output import Output
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import RawTensor

SMALL_REQUEST, SMALL_REPLY = 2**19, 2**20
"""Bytes up to which a call by value is the faster one."""
FITS = 2**21
"""Bytes that a message certainly holds. Half of what it may have: what a model that was deployed anew makes of the same latents
mostly fits too."""
JPEG_SHARE = 3
"""Times as small as its pixels a JPEG is, of noise at this quality too."""
FLOAT = 4
"""Bytes of a value at most, where it is not said."""
CHANNELS = 4
"""Of pixels at most: alpha is one."""


@dataclass(frozen=True)
class CallSize:
    """Sizes of calls of one model.

    Attributes:
        values_a_latent: values of pixels that one value of latents becomes at most, whatever the layout.
    """

    values_a_latent: float

    @classmethod
    def of(cls, model: ModelDescription) -> CallSize | None:
        """By what the model says of its latents; None where it does not."""
        if not model.latent_channels or not model.spatial_ratio:
            return None
        pixels = model.spatial_ratio**2 * (model.temporal_ratio or 1)
        return cls(CHANNELS * pixels / model.latent_channels)

    def is_small(self, request: Request) -> bool:
        """Whether neither the request nor any reply to it is large."""
        if isinstance(request, DecodeRequest):
            most = self._decoded(request)
            likely = most / JPEG_SHARE if request.output is Output.JPEG else most
            return request.latents.data.nbytes <= SMALL_REQUEST and likely <= SMALL_REPLY and most <= FITS
        image = request.image
        if not isinstance(image, RawTensor):  # a file tells nothing of how many pixels are in it
            return False
        # Of each pixel value come less than one latent value, and of moments two.
        return image.data.nbytes <= SMALL_REQUEST and 2 * FLOAT * math.prod(image.shape) <= SMALL_REPLY

    def _decoded(self, request: DecodeRequest) -> float:
        is_floats = request.output in (Output.PT, Output.UNIT)
        return math.prod(request.latents.shape) * self.values_a_latent * (FLOAT if is_floats else 1)
