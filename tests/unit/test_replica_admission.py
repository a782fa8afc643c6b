"""Shares of a replica's own queue, at which all doors meet: the ingresses, handles, and its own path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from limits import WAIT_S
from remote_vae.errors import Overloaded
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.base import Engine
from remote_vae_serve.replica.replica import VAE, WITHOUT_TRACEBACKS
from samples import latents
from sick import Replica, Sick, engine, make

__all__ = ["engine", "make"]  # fixtures

FULL = "queue of model is full"
SOON_S = 10.0


@pytest.fixture
def replica(engine: Sick, make: Callable[[Engine], Replica]) -> VAE:
    """It holds two requests at a time, and answers none before `gate` is open."""
    vae = make(engine).vae
    vae._config = VAEConfig(source="x", max_requests=2)
    engine.gate.clear()
    return vae


def of(client: str) -> tuple[Any, ...]:
    return DecodeRequest(from_array(latents(1, 4, 8, 8)), client=client, deadline_s=WAIT_S).to_plain()


async def assert_refused(call: Coroutine[Any, Any, Any]) -> None:
    """At once: what is let in waits for the gate."""
    with pytest.raises(Overloaded, match=FULL):
        await asyncio.wait_for(call, SOON_S)


def test_a_client_that_holds_its_share_is_refused_and_who_holds_nothing_is_let_in(replica: VAE, engine: Sick) -> None:
    async def ask() -> list[tuple[Any, ...]]:
        let_in = [asyncio.ensure_future(replica.decode(of("greedy")))]
        await asyncio.sleep(0)
        await assert_refused(replica.decode(of("greedy")))
        await assert_refused(replica.decode(of("greedy"), ()))
        with pytest.raises(Overloaded, match=FULL), replica.place("greedy"):
            pass
        let_in.append(asyncio.ensure_future(replica.decode(of("another"))))
        await asyncio.sleep(0)
        await assert_refused(replica.decode(of("greedy")))
        engine.gate.set()
        return await asyncio.gather(*let_in)

    assert len(asyncio.run(ask())) == 2


def test_what_another_replica_has_let_in_is_not_refused_here(replica: VAE, engine: Sick) -> None:
    async def ask() -> tuple[Any, ...]:
        first = asyncio.ensure_future(replica.decode(of("greedy")))
        await asyncio.sleep(0)
        handed_back = asyncio.ensure_future(replica.decode(of("greedy"), [("other", 1.0)]))
        await asyncio.sleep(0)
        engine.gate.set()
        return await asyncio.gather(first, handed_back)

    assert len(asyncio.run(ask())) == 2


def test_a_place_at_its_own_path_counts_beside_those_by_handle(replica: VAE) -> None:
    with replica.place("greedy"):
        asyncio.run(assert_refused(replica.decode(of("greedy"))))
        with replica.place("another"):
            pass


def test_a_replica_logs_its_refusals_without_tracebacks(replica: VAE) -> None:
    assert WITHOUT_TRACEBACKS in logging.getLogger("ray.serve").filters
