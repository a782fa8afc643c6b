"""`HandingOn`: a request that came by a replica's own HTTP side, and has long work before it there, is answered by another
replica of the model, through a Ray handle.

HAProxy balances by connections: a video of ten seconds counts as much as an image of 20 ms. Through the ingress such a request
goes round by `HandingBack`; at the model's own path the replica sends it on the same round itself.
"""

from __future__ import annotations

import asyncio
import time

from ray import serve

from remote_vae.errors import Overloaded, UnknownModel
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae.transports.handle import MODEL_DEPLOYMENT, HandleTransport
from remote_vae.transports.retry import ENDLESS

KNOWN_S = 2.0
"""For so long it is known whether there are others."""
MOST = 8
"""Requests that are with others at a time: where all are as busy nothing is won, and it costs some milliseconds of a core."""


class HandingOn:
    """For one replica.

    Args:
        application: of the model.
        replica: its name.
    """

    def __init__(self, application: str, replica: str) -> None:
        self._application = application
        self._replica = replica
        self._transport: HandleTransport | None = None
        self._with_others = 0
        self._others = False
        self._asked_at = -KNOWN_S

    async def answer(self, request: Request, wait_s: float) -> Result | None:
        """What another replica makes of the request, which would wait so many seconds here; None where it is to stay. Raises
        RemoteVAEError."""
        if self._with_others >= MOST or not await self._has_others():
            return None
        self._with_others += 1
        try:
            if self._transport is None:
                self._transport = await asyncio.to_thread(HandleTransport.of_app, self._application, ENDLESS)
            return await self._transport.try_one_async(request, ((self._replica, wait_s),))
        except (Overloaded, UnknownModel):  # of Serve's router; here it has a place
            return None
        finally:
            self._with_others -= 1

    async def _has_others(self) -> bool:
        if time.monotonic() - self._asked_at >= KNOWN_S:
            self._asked_at = time.monotonic()
            self._others = await asyncio.to_thread(_replicas, self._application) > 1
        return self._others


def _replicas(application: str) -> int:
    """How many replicas of the model run."""
    try:
        states = serve.status().applications[application].deployments[MODEL_DEPLOYMENT].replica_states
    except Exception:  # the controller restarts now and then: the request stays here
        return 0
    return int(states.get("RUNNING", 0))
