"""`Operation`: a decode or an encode of a batch by a diffusers model, whole or sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from remote_vae_serve.engine.rewrites.deferred import value_of
from remote_vae_serve.engine.rewrites.rewriting import EAGER, Rewriting
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints


class Run(Protocol):
    """Work on a batch, or on a part of one that begins with sample `first`: noise is drawn for each by its place."""

    def __call__(self, batch: torch.Tensor, first: int = 0, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Operation:
    """A decode or an encode, with the request's hints.

    Attributes:
        hints: of a decode; their seed matters to nobody who only counts.
    """

    kind: Literal["decode", "encode"]
    hints: RequestHints = NO_HINTS

    @property
    def in_words(self) -> str:
        return "Decoding latents" if self.kind == "decode" else "Encoding pixels"

    @property
    def part(self) -> str:
        """Of diffusers' models: what each tile goes through."""
        return "decoder" if self.kind == "decode" else "encoder"

    @property
    def unseeded(self) -> Operation:
        return replace(self, hints=replace(self.hints, seed=None))

    def of_sample(self, number: int) -> Operation:
        """The operation on one sample of a batch, by its place there."""
        return replace(self, hints=self.hints.of_sample(number))


DECODE, ENCODE = Operation("decode"), Operation("encode")


def run_of(
    operation: Operation,
    model: Any,
    space: LatentSpace,
    pixels: torch.dtype,
    found: Callable[[type[Any]], object] = lambda distribution: None,
    rewriting: Rewriting = EAGER,
) -> Run:
    """The work as a function of a batch. What an encoder with a distribution gives are its moments: samples are drawn of them for
    the whole batch at once, or a seed would not give what it gives in diffusers.

    Args:
        space: of the model.
        pixels: the dtype that decoded ones are wanted in.
        found: told the class of the distribution.
        rewriting: the rewrites that are in force; the model was prepared by them.
    """
    family = space.family

    def decode(latents: torch.Tensor, first: int = 0) -> torch.Tensor:
        with rewriting:
            return value_of(family.decode(model, latents, space, operation.hints.of_sample(first)).to(pixels))  # type: ignore[no-any-return]

    def encode(picture: torch.Tensor, first: int = 0) -> torch.Tensor:
        to_range = family.range.from_signed
        with rewriting:
            encoded = family.encode(model, picture if to_range is None else to_range(picture))
        if isinstance(encoded, torch.Tensor):
            return value_of(encoded)  # type: ignore[no-any-return]
        found(type(encoded))
        return value_of(encoded.parameters)  # type: ignore[no-any-return]

    return decode if operation.kind == "decode" else encode


def one_by_one(run: Run, batch: torch.Tensor) -> torch.Tensor:
    """What `run` makes of each sample, as one batch. Each is put in its place as it comes: a list of them, joined at the end,
    would take twice the memory."""
    first = run(batch[:1])
    made = first.new_empty((len(batch), *first.shape[1:]))
    made[:1] = first
    del first
    for number in range(1, len(batch)):
        made[number : number + 1] = run(batch[number : number + 1], number)
    return made
