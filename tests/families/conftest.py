"""One model served at a time: pytest runs all tests of a case, in whatever file, before it serves the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from families.shown import parameters
from families.through_engine import Served, serving


@pytest.fixture(scope="session", params=parameters())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, tmp_path_factory.mktemp("case")) as served:
        yield served


@pytest.fixture(autouse=True)
def _quiet(quiet: None) -> None:
    """Pipelines say in the log what they were built without."""
