"""What one request does to a model is over when the next one comes: neighbours, exceptions, random numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from families.stumbling import Stumbled, last_step, stumble
from families.through_engine import WAIT_S, Served
from remote_vae_serve.engine.abandonment import Abandoned
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan

# LTX-2's diffusion decoder calls it so by itself, on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

THREADS = 4
IN_TILES = TilingPlan(32)


def test_four_threads_at_once_get_what_each_gets_alone(served: Served) -> None:
    four = served.latents(THREADS).split(1)
    alone = [served.ask(one) for one in four]
    begin = threading.Barrier(THREADS)

    def ask(latents: torch.Tensor) -> torch.Tensor:
        begin.wait(WAIT_S)
        return served.ask(latents)

    with ThreadPoolExecutor(THREADS) as threads:
        together = list(threads.map(ask, four))
    assert all(map(torch.equal, together, alone))
    assert not torch.equal(alone[0], alone[1])


def test_after_an_exception_the_next_decode_is_what_it_was_before(served: Served) -> None:
    latents, other = served.latents(2).split(1)
    before = served.ask(latents)
    mend = stumble(last_step(served))
    with pytest.raises(Stumbled):
        served.ask(other)
    mend()
    assert torch.equal(served.ask(latents), before)


def test_a_decode_moves_nobody_elses_random_numbers(served: Served) -> None:
    latents, state = served.latents(1), torch.random.get_rng_state()
    first = served.ask(latents)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.random.manual_seed(3)
    try:
        assert torch.equal(served.ask(latents), first)
    finally:
        torch.random.set_rng_state(state)


def test_after_an_abandoned_decode_the_next_is_what_it_was_before(served: Served) -> None:
    """Abandoned just before its last tile or chunk: what a module keeps from one to the next is there then."""
    engine, asked, last = served.engine, 0, 0
    unpacked = engine.processor.unpack_latents(served.request(served.latents(1)))
    once, hints = unpacked.latents, unpacked.hints

    def is_wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked != last

    larger = torch.cat([torch.cat([once] * 2, -1)] * 2, -2)
    for latents, plan in ((once, UNTILED), (larger, IN_TILES))[: 1 if engine.space.family.tile is None else 2]:
        last = asked = 0
        with engine.abandonment.unless(is_wanted):
            before = engine.decode(latents, plan, hints).pixels
        last, asked = asked, 0
        if not last:
            pytest.skip("its decoder is no module of its own")
        with engine.abandonment.unless(is_wanted), pytest.raises(Abandoned):
            engine.decode(latents * 0.5, plan, hints)
        assert torch.equal(engine.decode(latents, plan, hints).pixels, before)
