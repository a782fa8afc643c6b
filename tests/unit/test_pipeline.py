"""Which requests are unpacked at once, and which in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from in_process import fake_engine
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.replica import pipeline as module
from remote_vae_serve.replica.pipeline import Pipeline
from samples import latents

SMALL, OTHER, LARGE = (1, 4, 8, 8), (1, 4, 8, 9), (1, 4, 128, 129)


def in_threads(monkeypatch: pytest.MonkeyPatch, *requests: DecodeRequest) -> list[bool]:
    """For each request whether a thread unpacked it."""
    pipeline = Pipeline(fake_engine(), "model")
    handed: list[Any] = []
    submit = pipeline._unpackers.submit
    monkeypatch.setattr(pipeline._unpackers, "submit", lambda *given: handed.append(given) or submit(*given))

    async def one_by_one() -> list[bool]:
        answers = []
        for request in requests:
            handed.clear()
            await pipeline.answer(request)
            answers.append(bool(handed))
        return answers

    try:
        return asyncio.run(one_by_one())
    finally:
        pipeline.close()


def request(shape: tuple[int, ...], seed: int | None = None) -> DecodeRequest:
    return DecodeRequest(from_array(latents(*shape)), hints=Hints(seed=seed))


def test_small_latents_of_a_shape_that_is_known_are_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(shape) for shape in (SMALL, SMALL, OTHER, OTHER, SMALL, LARGE, LARGE)]
    assert in_threads(monkeypatch, *asked) == [True, False, True, False, False, True, True]


def test_a_seed_makes_no_new_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_threads(monkeypatch, *(request(SMALL, seed) for seed in (1, 2, None, 3))) == [True, False, False, False]


def test_no_more_shapes_are_remembered_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHAPES", 1)
    asked = [request(shape) for shape in (SMALL, OTHER, OTHER, SMALL)]
    assert in_threads(monkeypatch, *asked) == [True, True, True, False]
