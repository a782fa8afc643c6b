"""The health check of a loaded model: `Probe` decodes one small latent, always the same, to finite pixels. What clients send
proves nothing: one of them can send what no model decodes."""

from __future__ import annotations

import logging

import torch

from remote_vae.errors import BadRequest, ModelFailed, RemoteVAEError, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.engine.base import Engine
from remote_vae_serve.engine.memory.out_of_memory import is_out_of_memory
from remote_vae_serve.processing.finite import is_finite

logger = logging.getLogger("ray.serve")

EDGE = 4
SHAPES = (
    ("batch", "channels", "rows", "columns"),
    ("batch", "channels", "frames", "rows", "columns"),
    ("batch", "doubled", "frames", "rows", "columns"),
)
"""Of latents that are probed with, the first of them that the model takes: a small picture, or one frame of a video. A model that
takes none of them is not probed: tokens alone, or clips of many frames, which cost too much."""
SAID = {"seed": 0, "decode_timestep": 0.0, "sigma_data": 0.5}
"""Hints for those that take them, where the application has not said: who draws noise draws the same, and who wants to be told
something is."""
RETRY_AFTER_S = 3.0
"""Serve replaces a replica that failed three checks in a row: at two seconds a check, before a client's third retry."""
NOT_FINITE = "the model decodes a small fixed latent to NaN or infinity"


def being_replaced() -> Unavailable:
    """The 503 of a replica that has failed, until Serve has replaced it."""
    return Unavailable("This replica has failed and is being replaced; try again", retry_after=RETRY_AFTER_S)


class Probe:
    """A decode of a fixed latent, chosen when the model is loaded: what it could decode then, it has to decode ever after.

    Args:
        engine: loaded.

    Raises:
        ModelFailed: it decodes to NaN or infinity, or the device fails. Told at once: the next replica would do no better.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._request: DecodeRequest | None = None
        if not engine.is_probed:
            return
        channels = engine.space.channels
        sizes = {"batch": 1, "channels": channels, "doubled": 2 * channels, "frames": 1, "rows": EDGE, "columns": EDGE}
        names = set(SAID).intersection(engine.space.takes).difference(engine.hints.given())
        hints = Hints.from_plain({name: SAID[name] for name in names})
        for axes in SHAPES:
            latents = torch.randn([sizes[axis] for axis in axes], generator=torch.Generator().manual_seed(0))
            request = DecodeRequest(from_array(latents), Scaling(own=True), Output.PT, hints=hints)
            try:
                finite = self._is_finite(request)
            except RemoteVAEError:  # no latents of this model, or no memory for them now
                continue
            except Exception as error:
                if "CUDA error" in str(error):
                    raise ModelFailed(f"The device fails: {_in_words(error)}") from error
                logger.info("%s cannot be probed with %s: %s", engine.space.class_name, axes, _in_words(error))
                continue
            if not finite:
                raise ModelFailed(f"Its weights are of no use: {NOT_FINITE}")
            self._request = request
            return
        logger.info("%s takes no latents as small as a health check's; it is served without", engine.space.class_name)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the latent; None where the model is not probed."""
        return None if self._request is None else self._request.latents.shape

    def fault(self) -> str | None:
        """The health check: why this replica is of no use any more; None where it is, or where nothing can be said.

        On the thread that decodes.
        """
        if self._request is None:
            return None
        try:
            return None if self._is_finite(self._request) else NOT_FINITE
        except RemoteVAEError:  # out of memory, for the moment
            return None
        except Exception as error:
            return None if is_out_of_memory(error) else f"a small fixed latent is not decoded: {_in_words(error)}"

    def _is_finite(self, request: DecodeRequest) -> bool:
        """Whether that decodes to finite pixels. Raises what a decode raises."""
        engine = self._engine
        unpacked = engine.processor.unpack_latents(request)
        plan = engine.plan_decode(tuple(unpacked.latents.shape), unpacked.hints)
        try:
            return is_finite(engine.decode(unpacked.latents, plan, unpacked.hints).pixels)
        except BadRequest as error:
            if error.parameter == "tensor":  # an engine's word for NaN in float32 too
                return False
            raise


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
