"""A served case as a `RemoteVAE`: requests go from the client to the replica's pipeline, without a server between."""

from __future__ import annotations

from typing import Any

from families.through_engine import Served
from remote_vae import RemoteVAE
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports.transport import Transport
from remote_vae_serve.replica.description import describe_engine


class PipelineTransport(Transport):
    """To one served case, by the tuples that cross a handle.

    Attributes:
        asked: the verbs of what was sent.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.asked: list[str] = []

    def try_one(self, request: Request) -> Result:
        self.asked.append(request.verb)
        read: Any = type(request)
        return Result.from_plain(self._served.answer(read.from_plain(request.to_plain())).to_plain())

    async def try_one_async(self, request: Request) -> Result:
        raise NotImplementedError

    def describe(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(describe_engine(self._served.engine).to_plain())

    async def describe_async(self, wake: bool = False) -> ModelDescription:
        raise NotImplementedError


def remote(served: Served) -> RemoteVAE:
    return RemoteVAE(PipelineTransport(served))
