"""Bounds of the dependencies: each has an upper one, and what constraints.txt installs lies within."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[2]


def requirements() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for written in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, written):
            if requirement.name != "remote-vae" and not requirement.name.startswith("types-"):
                yield requirement


CONSTRAINTS = {
    canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
    for requirement in map(
        Requirement, (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    )
}


@pytest.mark.parametrize("requirement", list(requirements()), ids=str)
def test_a_dependency_has_an_upper_bound_above_what_is_installed(requirement: Requirement) -> None:
    assert any(bound.operator == "<" for bound in requirement.specifier)
    installed = CONSTRAINTS.get(canonicalize_name(requirement.name))
    assert installed is None or requirement.specifier.contains(installed)
