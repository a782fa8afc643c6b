"""`Waiting`: what a call waits for at the moment, told to the `on_wait` of a client several times a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from remote_vae.protocol.model_description import ModelDescription

State = Literal["waiting", "starting", "queued", "decoding", "encoding", "receiving", "retrying"]
LONGEST_S = 10**6
"""Of one step of a start: nothing takes so long."""
PROCESS_S = 3.0
"""Of a replica's process, before it begins to tell how long it takes."""


@dataclass(frozen=True)
class Waiting:
    """What a call waits for.

    Attributes:
        state: `waiting` for an answer, nothing else being known yet, or where the server says nothing; `starting`, for a replica
            of the model; `queued`, for requests that came before; `decoding` or `encoding`; `receiving` the result; `retrying`,
            for the next try.
        seconds: since the call began, 0 or more.
        reason: of `starting` and `retrying`, a sentence for people; "" where there is none.
        expected_s: seconds that `starting` took the last time, or that the pause before the next try takes; None where nobody
            knows.
        ahead: of `queued`, requests that have their turn before, 1 or more; None where nobody knows.
        received, total: of `receiving`, bytes; `total` is None where the server does not say it.
    """

    state: State
    seconds: float
    reason: str = ""
    expected_s: float | None = None
    ahead: int | None = None
    received: int = 0
    total: int | None = None

    @classmethod
    def at_server(cls, verb: str, seconds: float, description: ModelDescription | None) -> Waiting:
        """For an answer that has not begun to come, by what the server says of the model."""
        if description is None:
            return cls("waiting", seconds)
        if description.state in ("cold", "starting"):
            return cls("starting", seconds, description.reason or "", _start_s(description.startup or {}))
        if description.ahead and description.ahead > 0:
            return cls("queued", seconds, ahead=description.ahead)
        if description.state != "ready":
            return cls("waiting", seconds, description.reason or "")
        return cls("encoding" if verb == "encode" else "decoding", seconds)

    def __str__(self) -> str:
        """For people, on one line: `starting, 12 s of about 40: waits for a GPU`."""
        about = f", {self.seconds:.0f} s"
        if self.state == "queued":
            about = f" behind {self.ahead}{about}"
        elif self.state == "receiving":
            of_total = f" of {self.total / 2**20:.1f}" if self.total else ""
            about = f" {self.received / 2**20:.1f}{of_total} MiB{about}"
        elif self.expected_s is not None:
            about += f" of about {self.expected_s:.0f}" if self.state == "starting" else f", in {self.expected_s:.0f} s"
        printable = (character if character.isprintable() else " " for character in self.reason)
        reason = " ".join("".join(printable).split())
        return f"{self.state}{about}{': ' if reason else ''}{reason}"


OnWait = Callable[[Waiting], object]
"""Told of it by the thread that waits. What it raises ends the wait, and the server drops the work: `errors.Cancelled`, or any
other."""


def _start_s(took: Mapping[str, float]) -> float | None:
    steps = [seconds for step, seconds in took.items() if step.endswith("_s")]
    # Anybody's server says it: one that says nonsense must not fail the call.
    return PROCESS_S + sum(steps) if steps and all(0 <= seconds < LONGEST_S for seconds in steps) else None
