"""Generators in the server's own cluster, which decode through a Ray handle: `python -m benchmarks.soak.handles ACTORS SECONDS`.

A process of its own, that joins the Ray of the server; it writes a line of JSON for each answer.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray

from benchmarks.soak.clients import DEADLINE_S, TRY_S, ours
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.works import DOORS, works
from remote_vae import RemoteVAE


@ray.remote(num_cpus=0, max_restarts=-1)
class Generator:
    """Asks for one thing after the other."""

    def ask(self, number: int, until: float) -> list[str]:
        todo = works()
        vaes = {name: RemoteVAE.from_app(name, deadline=DEADLINE_S, timeout=TRY_S) for name in {w.model for w in todo}}
        answers: list[str] = []
        while time.time() < until:
            work = todo[number % len(todo)]
            number += 1
            began = time.time()
            try:
                outcome, why = ours(vaes[work.model], work)
            except Exception as error:
                outcome, why = Outcome.LOST, repr(error)
            answers.append(
                Answer("handle", DOORS[work.model], work.name, outcome, began, time.time() - began, why).to_json()
            )
        return answers


def main(actors: int, seconds: float) -> None:
    ray.init("auto", namespace="soak", log_to_driver=False)
    until = time.time() + seconds
    generators: list[Any] = [Generator.remote() for _ in range(actors)]  # type: ignore[attr-defined]
    for answers in ray.get([generator.ask.remote(number, until) for number, generator in enumerate(generators)]):
        print("\n".join(answers), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
