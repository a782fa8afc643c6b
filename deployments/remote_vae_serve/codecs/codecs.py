"""Encode uint8 pixels as a file, JPEG, PNG or mp4, or hand on the raw tensor: the last step of a decode, on the host.

Bytes in memory only; nothing here opens a file. Which formats there are is said in `remote_vae.protocol.output`.
"""

from __future__ import annotations

import numpy as np

from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.codecs.alpha import over_white
from remote_vae_serve.codecs.host_copy import HostCopy
from remote_vae_serve.codecs.jpeg import to_jpeg
from remote_vae_serve.codecs.mp4 import to_mp4
from remote_vae_serve.codecs.png import to_png


def write(pixels: HostCopy, output: Output, fps: float) -> Result:
    """Encode pixels as the output asks for, and make the reply of them.

    Args:
        pixels: of what `postprocess.to_output` made for the same output.
        fps: frames a second, of a video.

    Returns:
        A file, or the raw tensor for PT, UNIT and UINT8.

    Raises:
        InternalError: the video encoder failed.
    """
    if output is Output.MP4:
        frames = (over_white(piece) for piece in pixels.pieces())
        return _file(output, to_mp4(frames, (*pixels.shape[:3], 3), fps))
    if output is Output.PNG:
        return _file(output, to_png(pixels.whole()[0].numpy()))
    if output is Output.JPEG:
        return _file(output, to_jpeg(pixels.whole()[0]))
    raw = from_array(pixels.whole())
    return Result(output.media_type, raw.data, raw.dtype, raw.shape)


def _file(output: Output, file: bytes) -> Result:
    return Result(output.media_type, np.frombuffer(file, np.uint8))
