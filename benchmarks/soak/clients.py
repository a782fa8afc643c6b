"""The clients of a soak: ours, over HTTP and through a handle, with a deadline; and a plain one, which tries nothing again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import requests
import torch

from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.works import DOORS, Work
from remote_vae import RemoteVAE, RemoteVAEError

DEADLINE_S = 60.0
TRY_S = 20.0
HUNG_S = 90.0

Ask = Callable[[Work], tuple[Outcome, str]]


def ours(vae: RemoteVAE, work: Work) -> tuple[Outcome, str]:
    """With retries until the deadline, whatever is behind `vae`."""
    try:
        is_decode = work.verb == "decode"
        got = vae.decode(work.sent, output_type="pt") if is_decode else vae.encode(work.sent, sample_mode="argmax")
    except RemoteVAEError as error:
        return Outcome.LOST, f"{error.code}: {error.message}"
    return (Outcome.RIGHT, "") if work.is_right(got) else (Outcome.WRONG, f"{tuple(got.shape)}")


def plain(url: str, work: Work) -> tuple[Outcome, str]:
    """One POST, as any client of the protocol sends it."""
    headers = {"accept": "tensor/binary"}
    if work.verb == "decode":
        assert isinstance(work.sent, torch.Tensor)
        query = {"shape": list(work.sent.shape), "dtype": "float32", "output_type": "pt", "do_scaling": True}
        body = work.sent.numpy().tobytes()
    else:
        query, body = (
            {"shape": list(_uint8(work).shape), "dtype": "uint8", "sample_mode": "argmax"},
            _uint8(work).tobytes(),
        )
        headers["content-type"] = "tensor/binary"
    try:
        answer = requests.post(
            f"{url}/{work.model}/{work.verb}", params=query, data=body, headers=headers, timeout=(TRY_S, HUNG_S)
        )
    except requests.ReadTimeout:
        return Outcome.HUNG, "no answer"
    except requests.RequestException as error:
        return Outcome.LOST, type(error).__name__
    if answer.status_code == 200:
        shape = json.loads(answer.headers["shape"])
        got = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).view(shape)
        return (Outcome.RIGHT, "") if work.is_right(got) else (Outcome.WRONG, f"{shape}")
    return (Outcome.REFUSED if _is_ours(answer) else Outcome.LOST), f"{answer.status_code} {answer.text[:80]}"


def _uint8(work: Work) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(work.sent)


def _is_ours(answer: requests.Response) -> bool:
    try:
        return {"error", "code", "request_id"} <= set(answer.json())
    except ValueError:
        return False


class Clients:
    """Threads that ask one thing after the other until they are told to stop.

    Args:
        kind: what they are called in the report.
        ask: for each client, how it asks.
        works: in turn, each client from another one on.
        heard: is told of every answer.
    """

    def __init__(self, kind: str, asks: Sequence[Ask], works: Sequence[Work], heard: Callable[[Answer], None]) -> None:
        self._kind, self._works, self._heard = kind, works, heard
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, ask), daemon=True) for number, ask in enumerate(asks)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> int:
        """End after what is being asked; how many never come to an end."""
        self._over.set()
        give_up = time.monotonic() + HUNG_S
        for thread in self._threads:
            thread.join(max(give_up - time.monotonic(), 0))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, number: int, ask: Ask) -> None:
        while not self._over.is_set():
            work = self._works[number % len(self._works)]
            number += 1
            began = time.time()
            outcome, why = ask(work)
            took_s = time.time() - began
            if outcome is not Outcome.RIGHT and took_s > HUNG_S:
                outcome = Outcome.HUNG
            self._heard(Answer(self._kind, DOORS[work.model], work.name, outcome, began, took_s, why))
            if outcome is not Outcome.RIGHT:
                self._over.wait(0.1)  # who is refused at once is no storm
