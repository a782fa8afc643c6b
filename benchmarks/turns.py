"""`Turns`: contenders measured one after the other, again and again, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from benchmarks.findings import Figure, figure
from benchmarks.load import Answers, Load

REQUESTS = 0


@dataclass(frozen=True)
class Settings:
    """How long it all takes.

    Attributes:
        repetitions: of each contender's turn.
        seconds: of a turn, at least.
    """

    repetitions: int = 5
    seconds: float = 2.0


@dataclass(frozen=True)
class Request:
    """What everybody is asked to decode: random float32 latents.

    Attributes:
        asked: more query parameters; other servers than ours ignore them.
    """

    shape: tuple[int, ...]
    asked: Mapping[str, str] = field(default_factory=dict)

    def written(self, folder: Path) -> str:
        path = folder / "-".join(map(str, self.shape))
        if not path.exists():
            numbers = np.random.default_rng(0).standard_normal(math.prod(self.shape), np.float32)
            path.write_bytes(numbers.tobytes())
        return str(path)

    @property
    def query(self) -> str:
        shape = [("shape", str(axis)) for axis in self.shape]
        return urlencode([*shape, ("dtype", "float32"), ("do_scaling", "False"), *self.asked.items()])


class Turns:
    """Every contender's answers, by number of clients.

    Args:
        contenders: name to URL.
        seconds: of a turn; the settings' if None.
        with_requests: by one client more, which is the library `requests`; it counts as `REQUESTS` clients.
    """

    def __init__(
        self,
        contenders: Mapping[str, str],
        request: Request,
        settings: Settings,
        clients: Sequence[int] = (1, 8),
        seconds: float | None = None,
        with_requests: bool = False,
    ) -> None:
        clients = [*clients, REQUESTS] if with_requests else clients
        self._answers: dict[tuple[str, int], list[Answers]] = {}
        with tempfile.TemporaryDirectory() as folder:
            body = request.written(Path(folder))
            for _ in range(settings.repetitions):
                for many in clients:
                    for name, url in contenders.items():
                        # LitServe's type of body; ours asks for nothing, and the others do not look.
                        headers = {"content-type": "application/octet-stream" if "itServe" in name else "tensor/binary"}
                        load = Load(f"{url}?{request.query}", body, many, seconds or settings.seconds, headers=headers,
                                    with_requests=many == REQUESTS)  # fmt: skip
                        answers = load.run()
                        if not answers.latencies_ms:
                            raise RuntimeError(f"{name} gave no answer to {url}: {answers.statuses}")
                        self._answers.setdefault((name, many), []).append(answers)
                        print(f"    {name}, {many}: p50 {answers.p50:.2f} ms, {answers.rate:.1f}/s", file=sys.stderr)

    def p50(self, name: str, clients: int) -> Figure:
        what = "p50, by requests" if clients == REQUESTS else f"p50, {clients} client{'s' * (clients > 1)}"
        return figure(name, what, "ms", [one.p50 for one in self._answers[name, clients]])

    def rate(self, name: str, clients: int) -> Figure:
        what = f"rate, {clients} client{'s' * (clients > 1)}"
        return figure(name, what, "/s", [one.rate for one in self._answers[name, clients]])

    def figures(self) -> list[Figure]:
        """p50 of one client, rate of many."""
        keys = sorted(self._answers, key=lambda key: key[1])
        return [self.rate(*key) if key[1] > 1 else self.p50(*key) for key in keys]

    def body(self, name: str) -> bytes:
        """One answer of theirs."""
        return next(answers[0].body for (who, _), answers in self._answers.items() if who == name)

    def notes(self) -> list[str]:
        """What the header says, what failed, how much of a core the client took at most."""
        notes = []
        for (name, clients), answers in self._answers.items():
            stages = {stage: statistics.median(one.stages[stage] for one in answers) for stage in answers[0].stages}
            if stages:
                said = ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items())
                whole = statistics.median(one.p50 for one in answers)
                rest = whole - sum(stages.values())
                notes.append(f"{name}, {clients} client(s): of {whole:.2f} ms {said}; around it {rest:.2f}.")
            if failed := sum(one.failed for one in answers):
                statuses = sum((Counter(one.statuses) for one in answers), Counter[str]())
                notes.append(f"{name}, {clients} client(s): {failed} requests FAILED ({dict(statuses)}).")
        ours = [answers for (_, clients), answers in self._answers.items() if clients != REQUESTS]
        busiest = max(one.client_s / one.wall_s for answers in ours for one in answers)
        return [*notes, f"The client itself took {busiest:.0%} of a core at most."]
