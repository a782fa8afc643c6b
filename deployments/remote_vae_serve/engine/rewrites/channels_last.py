"""Weights in channels_last and channels_last_3d: convolutions then give activations of that layout, which all others keep.

oneDNN and cuDNN convolve channels_last; from NCHW they reorder every input and output. In bfloat16 with AMX it is half the time.
"""

from __future__ import annotations

import torch

from remote_vae_serve.engine.rewrites.rewriting import Rewrite

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class ChannelsLast(Rewrite):
    """Lays the weights of convolutions out channels_last."""

    name = "channels_last"

    def prepare(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if (layout := FORMATS.get(parameter.ndim)) is not None:
                parameter.data = parameter.data.contiguous(memory_format=layout)


def rows_of(activations: torch.Tensor) -> torch.Tensor | None:
    """Activations `[B, C, (T,) H, W]` as rows `[B, (T) H W, C]` in their own memory; None where they are not channels_last."""
    layout = FORMATS.get(activations.ndim)
    if layout is None or not activations.is_contiguous(memory_format=layout):
        return None
    return activations.movedim(1, -1).reshape(activations.shape[0], -1, activations.shape[1])
