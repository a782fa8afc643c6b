"""What a model does with a batch: `decode` or `encode`, at once or sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

Work = Literal["decode", "encode"]
Run = Callable[[torch.Tensor], torch.Tensor]
IN_WORDS: dict[Work, str] = {"decode": "Decoding latents", "encode": "Encoding pixels"}
PART: dict[Work, str] = {"decode": "decoder", "encode": "encoder"}
"""Of diffusers' models: what each tile goes through."""


def run_of(
    work: Work, model: Any, pixels: torch.dtype, found: Callable[[type[Any]], object] = lambda distribution: None
) -> Run:
    """The work as a function of a batch. What an encoder with a distribution gives are its moments: samples are drawn of them for
    the whole batch at once, or a seed would not give what it gives in diffusers.

    Args:
        pixels: the dtype that decoded ones are wanted in.
        found: told the class of the distribution.
    """

    def decode(latents: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model.decode(latents, return_dict=False)[0]
        return made.to(pixels)

    def encode(picture: torch.Tensor) -> torch.Tensor:
        encoded = model.encode(picture)
        distribution = getattr(encoded, "latent_dist", None)
        if distribution is not None:
            found(type(distribution))
        made: torch.Tensor = encoded.latents if distribution is None else distribution.parameters
        return made

    return decode if work == "decode" else encode


def one_by_one(run: Run, batch: torch.Tensor) -> torch.Tensor:
    """What `run` makes of each sample, as one batch. Each is put in its place as it comes: a list of them, joined at the end,
    would take twice the memory."""
    if len(batch) == 1:
        return run(batch)
    first = run(batch[:1])
    made = first.new_empty((len(batch), *first.shape[1:]))
    made[:1] = first
    del first
    for number in range(1, len(batch)):
        made[number : number + 1] = run(batch[number : number + 1])
    return made
