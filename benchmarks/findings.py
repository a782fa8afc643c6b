"""What a work found: `Figure`, one number measured several times; `Goal`, a ratio held against a limit; `Finding`, both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One number, of each repetition.

    Attributes:
        who, what: as in "ours, direct door", "p50, 1 client".
    """

    who: str
    what: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Goal:
    """A ratio of two figures of the same repetition, and what it is to be.

    Attributes:
        limit: the most it may be, or with `at_least` the least.
    """

    what: str
    values: tuple[float, ...]
    limit: float
    at_least: bool = False

    @classmethod
    def of(cls, what: str, ours: Figure, theirs: Figure, limit: float, at_least: bool = False) -> Goal:
        pairs = zip(ours.values, theirs.values, strict=True)
        return cls(what, tuple(one / other for one, other in pairs), limit, at_least)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> Literal["yes", "no", "unclear"]:
        """`unclear` where only some of the repetitions reach it."""
        reached = [value >= self.limit if self.at_least else value <= self.limit for value in self.values]
        return "yes" if all(reached) else "unclear" if any(reached) else "no"


@dataclass(frozen=True)
class Finding:
    """Attributes:
    notes: sentences: what the time is made of, what was checked, what failed.
    """

    number: str
    title: str
    figures: tuple[Figure, ...]
    goals: tuple[Goal, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)


def figure(who: str, what: str, unit: str, values: Sequence[float]) -> Figure:
    return Figure(who, what, unit, tuple(values))
