"""How a request ended: `Outcome`, and who asked for what when."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum


class Outcome(str, Enum):
    """RIGHT: the right pixels. REFUSED: an error in the agreed form. LOST: no answer, or an error in another form; of our own
    client any error. WRONG: other pixels. HUNG: no answer for so long that nobody would wait."""

    RIGHT = "right"
    REFUSED = "refused"
    LOST = "lost"
    WRONG = "wrong"
    HUNG = "hung"


@dataclass(frozen=True)
class Answer:
    """One request's end.

    Attributes:
        client: `ours`, `plain` or `handle`.
        door: `ingress` or `direct`, where the model stands in HTTP.
        began: seconds since 1970.
        took_s: until its end.
        why: what was said, where it is not right.
    """

    client: str
    door: str
    work: str
    outcome: Outcome
    began: float
    took_s: float
    why: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Answer:
        fields: Mapping[str, object] = json.loads(line)
        return cls(**{**fields, "outcome": Outcome(fields["outcome"])})  # type: ignore[arg-type]
