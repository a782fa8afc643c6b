"""`Models`: the seam of the HTTP app: a model's name to something that decodes. In the ingress that is a handle, at a path of its
own the replica itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result


@dataclass(frozen=True)
class Answerer:
    """One model, somewhere.

    Attributes:
        answer: decodes and encodes. Raises RemoteVAEError.
        announce: told of a request whose large body has not been read yet. Raises RemoteVAEError where that is not worth it.
    """

    answer: Callable[[Request], Awaitable[Result]]
    announce: Callable[[Request], Awaitable[None]]


class Models(Protocol):
    """The models that this app serves."""

    def place(self, name: str, client: str) -> AbstractContextManager[Answerer]:
        """The model of that name, and a place in its queue for a request of that client, for as long as the block lasts.

        Raises UnknownModel, or Unavailable where it exists and cannot answer; Overloaded where there is no place."""

    def describe(self, name: str) -> ModelDescription:
        """What is known of it, without waking it. Raises UnknownModel."""

    async def wake(self, name: str) -> ModelDescription:
        """What a replica of it says, started where there is none. Raises what `place` does."""

    def names(self) -> list[str]:
        """All names, sorted."""
