"""What is decoded: models of `benchmarks.gpu.models` at sizes that a processor is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import MODELS, Model, Size, tiny


@dataclass(frozen=True)
class Work:
    """A model with random weights, and the size of what is decoded.

    Attributes:
        compression: pixels of a latent along an edge, and frames of one.
    """

    model: Model
    size: Size

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def title(self) -> str:
        return f"{self.model.title}, {self.size}"

    def save(self, folder: Path) -> None:
        """The weights as an application finds them; the same each time."""
        self.model.build("float32", "cpu").save_pretrained(folder)

    def latents(self) -> torch.Tensor:
        return self.model.latents(self.size, "float32")

    def flops(self) -> int:
        """Floating-point operations of a decode, as diffusers wrote it."""
        from torch.utils.flop_counter import FlopCounterMode

        model: Any = self.model.build("float32", "meta")
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.decode(self.latents().to("meta"))
        return int(counter.get_total_flops())

    def tiny(self) -> Work:
        """The same, narrow and small: to see that a run runs."""
        if self.name == "taesd":
            return replace(self, size=Size(64, 64))
        small = tiny(self.model)
        return Work(small, small.sizes[0])


BY_NAME = {model.name: model for model in MODELS}
TAESD = Model(
    "taesd", "AutoencoderTiny", "AutoencoderTiny", {}, "madebyollin/taesd: the class's defaults", 4, ("float16",),
    (Size(512, 512),),
)  # fmt: skip
WORKS = {
    work.name: work
    for work in (
        Work(BY_NAME["sd15"], Size(512, 512)),
        Work(BY_NAME["sdxl"], Size(1024, 1024)),
        Work(TAESD, Size(512, 512)),
        Work(BY_NAME["wan"], Size(832, 480, 5)),
        Work(BY_NAME["hunyuan"], Size(256, 256, 9)),
    )
}
