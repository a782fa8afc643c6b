"""Arguments and result of an `encode` on the client: `EncodeCall`, the counterpart of `DecodeCall`. Pure."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from remote_vae.calls.decode_call import as_number, scaling_of
from remote_vae.errors import BadRequest
from remote_vae.protocol.encode_request import EncodeRequest, Picture, SampleMode, in_rgb
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import RawTensor, cast, from_array, host_bytes, is_torch, to_numpy, to_torch

if TYPE_CHECKING:
    import torch

Mode = Literal["sample", "argmax", "moments"]
Encodable = Any
"""PIL image, list of them, bytes of a file, torch tensor or numpy array: see `EncodeCall`."""


@dataclass(frozen=True, eq=False)
class EncodeCall:
    """The arguments of one `encode`.

    Attributes:
        image: a PIL image; a list of them, of one size: images, or the frames of one video where the model is one for
            videos; the bytes of a PNG, JPEG or WebP; uint8 `[N, H, W, 3]` or `[H, W, 3]`, as a list of PIL images; floats in
            [-1, 1], `[B, 3, H, W]`, `[3, H, W]`, or video `[B, 3, T, H, W]`. PIL images and uint8 are resized to the next
            smaller multiple of the model's ratio, as its pipelines do; the pixels of a PIL image are taken as they lie
            (no EXIF rotation), without their alpha; those of a file as they are to be seen, with it where the model takes it, as
            it takes uint8 of 4 channels (Qwen-Image-Layered).
        scaling_factor, shift_factor: `(z - shift_factor) * scaling_factor`.
        do_scaling: True applies the model's own convention where no factor is given; False applies factors only where
            they are given, as the Hugging Face helper.
        sample_mode: `sample`, `argmax` or `moments`: see `encode_request.SampleMode`.
        seed: of the sample.
        wire_dtype: dtype in which float pixels travel; None for their own.
        hints: what the picture and the model's config do not tell; most models need none.

    Raises:
        BadRequest: naming the argument.
    """

    image: Encodable
    scaling_factor: float | None = None
    shift_factor: float | None = None
    do_scaling: bool = False
    sample_mode: Mode = "sample"
    seed: int | None = None
    wire_dtype: str | None = None
    hints: Hints = field(default_factory=Hints)

    def __post_init__(self) -> None:
        if not isinstance(self.do_scaling, (bool, type(None))):
            raise BadRequest(f"do_scaling is {self.do_scaling!r}; expected True or False", parameter="do_scaling")
        for name in ("scaling_factor", "shift_factor"):
            object.__setattr__(self, name, as_number(float, name, getattr(self, name)))
        object.__setattr__(self, "seed", as_number(operator.index, "seed", self.seed))
        if self.sample_mode not in tuple(mode.value for mode in SampleMode):
            raise BadRequest(f"sample_mode is {self.sample_mode!r}; expected sample, argmax or moments",
                             parameter="sample_mode")  # fmt: skip

    @property
    def host_bytes(self) -> float:
        """Bytes of the image where it is a tensor in this process's memory; infinite elsewhere."""
        return host_bytes(self.image)

    def requests(self) -> list[EncodeRequest]:
        given = self.scaling_factor is not None or self.shift_factor is not None
        scaling = scaling_of(given or self.do_scaling, self.scaling_factor, self.shift_factor)
        return [EncodeRequest(self._image(), scaling, SampleMode(self.sample_mode), self.seed, self.hints)]

    def answer(self, results: Sequence[Result]) -> torch.Tensor | np.ndarray[Any, Any]:
        """Latents `[B, C, h, w]` or `[B, C, T, h, w]`: torch where torch was handed in or is imported anyway."""
        raw = results[0].tensor
        as_torch = is_torch(self.image) or ("torch" in sys.modules and not isinstance(self.image, np.ndarray))
        return to_torch(raw) if as_torch else to_numpy(raw)

    def _image(self) -> RawTensor | Picture:
        image = self.image
        if isinstance(image, (bytes, bytearray, memoryview)):
            return np.frombuffer(image, np.uint8)
        if isinstance(image, Image.Image):
            image = [image]
        if isinstance(image, (list, tuple)) and image and all(isinstance(one, Image.Image) for one in image):
            if len({one.size for one in image}) > 1:
                raise BadRequest("The images are not of one size; encode them one by one", parameter="image")
            image = np.stack([np.asarray(in_rgb(one)) for one in image])
        if not (is_torch(image) or isinstance(image, np.ndarray)):
            raise BadRequest(
                f"image is a {type(image).__name__}; expected a PIL image or a list of them, the bytes of a PNG, JPEG or "
                "WebP, a torch tensor or a numpy array",
                parameter="image",
            )
        is_uint8 = str(image.dtype).endswith("uint8")
        return from_array(image if self.wire_dtype is None or is_uint8 else cast(image, self.wire_dtype))
