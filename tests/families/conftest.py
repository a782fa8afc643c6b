"""One model served at a time: pytest runs all tests of a case, in whatever file, before it serves the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.utils import logging

from families.shown import parameters
from families.through_engine import Served, serving


@pytest.fixture(scope="session", params=parameters())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, tmp_path_factory.mktemp("case")) as served:
        yield served


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads wait for each other longer than these convolutions take, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Pipelines say in the log what they were built without."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
