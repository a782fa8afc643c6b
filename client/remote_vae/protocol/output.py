"""`Output`: the formats of a decode's reply, JPEG, PNG, mp4 or a tensor, and their media types. A new format begins here.

How a request asks for one is in `decode_request`; what leaves the device for it in the server's `processing.postprocess`; its
file in `codecs`; what a client makes of it in `calls.decode_call`.
"""

from __future__ import annotations

from enum import Enum


class Output(str, Enum):
    """What a reply carries. HTTP says it with three parameters and a header; see `_output`.

    JPEG and PNG hold one 8-bit RGB image. UNIT is `output_type=pil` as a float tensor in [0, 1]: `[B, C, H, W]`, or
    `[T, C, H, W]` for one video. PT is what the decoder put out, not clamped, `[B, C, H, W]` or `[B, C, T, H, W]`, in the
    model's dtype. UINT8 is `[B, H, W, C]` or `[T, H, W, C]`. MP4 is one video file.
    """

    JPEG = "jpg"
    PNG = "png"
    UNIT = "unit"
    PT = "pt"
    UINT8 = "uint8"
    MP4 = "mp4"

    @property
    def is_image(self) -> bool:
        return self in (Output.JPEG, Output.PNG)

    @property
    def media_type(self) -> str:
        media_types = {Output.JPEG: "image/jpeg", Output.PNG: "image/png", Output.MP4: "video/mp4"}
        return media_types.get(self, TENSOR)


TENSOR = "tensor/binary"
"""Media type of a reply that is no file: raw bytes, whose shape and dtype are in headers."""
IMAGES = tuple(output for output in Output if output.is_image)
FILE_TYPES = frozenset(output.media_type for output in Output) - {TENSOR}
"""Media types of replies that are files."""
