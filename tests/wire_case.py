"""One exchange of the wire, and what the table of them is made of: latents, pictures, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from samples import latents
from wire_answers import Decodes, Gives, Refused, pixels_of
from wire_clients import (
    Sent,
    file_of,
    today,
)  # fmt: skip

MAX_BODY = 1 << 16
HOSTS = {"decoder.example.org": "sd", "Videos.Example.org": "hunyuan"}


@dataclass(frozen=True, eq=False)
class WireCase:
    """One exchange.

    Attributes:
        path: as it stands in the URL; its first part is the model.
        sent: query, headers, body.
        gives: what must come back.
        model: which must answer, where the path does not say.
    """

    name: str
    path: str
    sent: Sent
    gives: Gives
    method: str = "POST"
    model: str = ""

    @property
    def verb(self) -> Any:
        last = self.path.strip("/").rpartition("/")[2]
        return last if last in ("decode", "encode") else None

    @property
    def answered_by(self) -> str:
        return self.model or self.path.strip("/").partition("/")[0]


Z = latents(1, 4, 4, 6)
HALF = latents(1, 4, 4, 6, seed=3).half()
BRAIN = latents(1, 4, 4, 6, seed=4).bfloat16()
BATCH = latents(3, 4, 2, 4)
PACKED, PACKED_SIZES = latents(1, 6, 64), {"height": 32, "width": 48}
FLUX = latents(1, 16, 4, 6)
FLUX_ONE = latents(16, 4, 6)
VIDEO = latents(1, 4, 3, 4, 6)
FRAMES = latents(1, 4, 2, 4, 6, seed=5)
SD_FACTOR, FLUX_FACTORS = 0.18215, (0.3611, 0.1159)

_noise = np.random.default_rng(0).integers(0, 256, (32, 48, 4), np.uint8)
RGBA = Image.fromarray(_noise)
RGB = Image.fromarray(np.ascontiguousarray(_noise[:, :, :3]))
GREY = RGB.convert("L")
PALETTE = RGB.convert("P")
ODD = Image.fromarray(np.ascontiguousarray(_noise[:29, :45, :3]))
WEBP = file_of(RGB, "WEBP", lossless=True)
JPEG = file_of(RGB, "JPEG")
SEEN = pixels_of(RGB)
PIXELS = SEEN.contiguous()
CLIP = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(6)) * 2 - 1
UINT8 = np.ascontiguousarray(_noise[None, :, :, :3])

PT = {"output_type": "pt"}
PLAIN = today(Z, do_scaling=False, output_type="pt")
PLAIN_GIVES = Decodes(Z, "pt", "none")


def bad(parameter: str, says: str = "", by: Any = "parser") -> Refused:
    return Refused(400, "bad_request", parameter, says or parameter, by)


def unknown_type(says: str) -> Refused:
    return Refused(415, "unknown_content_type", "content-type", says)


def no_route(says: str) -> Refused:
    return Refused(404, "unknown_route", None, says, "app")


def wrong_method(says: str) -> Refused:
    return Refused(405, "wrong_method", None, says, "app")
