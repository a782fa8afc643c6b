"""A model that falls asleep and wakes, again and again, under a trickle of requests: how many are lost, or of another form.

    python -m benchmarks.asleep [--changes 50] [--python-proxy] [--out benchmarks/results/asleep.md]

A fake engine under the launcher, everything as it is shipped but for a model that is idle soon. Four plain clients, which try
nothing again, send for a second and rest for about as long as it takes to fall asleep, so that requests meet the last replica as
it goes and the first as it comes; a fifth reads the model's state all along. Exit code 1 where anything is lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import requests

from benchmarks.report import commit
from benchmarks.under_launcher import fake_model, serve

MODEL = "sleeper"
IDLE_S = 1.5
SCALING = {
    "min_replicas": 0, "max_replicas": 1, "target_ongoing_requests": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1,
    "upscale_delay_s": 1, "downscale_delay_s": 1, "downscale_to_zero_delay_s": 0,
    "policy": {"policy_function": "remote_vae_serve.scaling:YieldWhenIdle", "policy_kwargs": {"idle_s": IDLE_S}},
}  # fmt: skip
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
BODY = bytes(4 * 4 * 64)
PIXELS = 3 * 64 * 64 * 4
BURST_S = 1.0
RESTS_S = (IDLE_S, IDLE_S + 4)
EVERY_S = 0.05
LOOK_S = 0.05
ANSWER_S = 60.0


class Trickle:
    """Requests to one model, and what became of them."""

    def __init__(self, url: str, seed: int = 0) -> None:
        self._url = f"{url}/{MODEL}"
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._sends_until = 0.0
        self.ended = Counter[str]()
        self.changes = 0
        self.longest_s = 0.0

    def run(self, changes: int, limit_s: float) -> None:
        """Until the model has changed so often between asleep and awake."""
        kept: list[requests.Session | object] = [requests.Session(), requests.Session(), requests, requests]
        work: list[Callable[[], None]] = [self._look, *(partial(self._send, by) for by in kept)]
        threads = [threading.Thread(target=one) for one in work]
        for thread in threads:
            thread.start()
        give_up = time.monotonic() + limit_s
        while self.changes < changes and time.monotonic() < give_up:
            self._sends_until = time.monotonic() + BURST_S
            time.sleep(BURST_S + self._random.uniform(*RESTS_S))
        self._over.set()
        for thread in threads:
            thread.join()

    def _send(self, by: requests.Session | object) -> None:
        """As a client with its own connection kept open, or with a new one for each request."""
        while not self._over.wait(EVERY_S):
            if time.monotonic() > self._sends_until:
                continue
            began = time.monotonic()
            ended = _posted(by, self._url)
            took_s = time.monotonic() - began
            with self._lock:
                self.ended[f"POST {ended}"] += 1
                self.longest_s = max(self.longest_s, took_s)

    def _look(self) -> None:
        session, was_ready = requests.Session(), False
        while not self._over.wait(LOOK_S):
            ended, is_ready = _read(session, self._url)
            with self._lock:
                self.ended[f"GET {ended}"] += 1
                if is_ready is not None and is_ready != was_ready:
                    self.changes, was_ready = self.changes + 1, is_ready

    @property
    def lost(self) -> int:
        return sum(times for how, times in self.ended.items() if not how.endswith("right"))


def _posted(by: requests.Session | object, url: str) -> str:
    try:
        answer = by.post(url, params=QUERY, data=BODY, timeout=ANSWER_S)  # type: ignore[attr-defined]
    except requests.RequestException as error:
        return f"cut: {type(error).__name__}"
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.headers.get('content-type')} {answer.text[:60]}"
    right = len(answer.content) == PIXELS and answer.headers.get("x-vae-model") == MODEL
    return "right" if right else f"wrong: {len(answer.content)} bytes"


def _read(session: requests.Session, url: str) -> tuple[str, bool | None]:
    try:
        answer = session.get(url, timeout=ANSWER_S)
        state = answer.json()["state"]
    except (requests.RequestException, ValueError, KeyError) as error:
        return f"cut or in another form: {type(error).__name__}", None
    known = answer.status_code == 200 and state in ("cold", "starting", "ready")
    return "right" if known else f"{answer.status_code} {state}", state == "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--python-proxy", action="store_true", help="instead of HAProxy")
    parser.add_argument("--limit-s", type=float, default=1800.0)
    parser.add_argument("--out", type=Path, help="also append the table there")
    args = parser.parse_args()
    model = fake_model(MODEL, False, {}) | {"deployments": [{"name": "VAE", "autoscaling_config": SCALING}]}
    with serve([model], not args.python_proxy, kept=("demo",), sleeps=True) as server:
        trickle = Trickle(server.url)
        trickle.run(args.changes, args.limit_s)
    text = _table(trickle, "the Python proxy" if args.python_proxy else "HAProxy")
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")
    if trickle.lost or trickle.changes < args.changes:
        sys.exit(f"{trickle.lost} lost; {trickle.changes} changes of {args.changes}")


def _table(trickle: Trickle, proxy: str) -> str:
    rows = [f"| {how} | {times} |" for how, times in sorted(trickle.ended.items())]
    head = f"| under {proxy}, {trickle.changes} changes between asleep and awake, at {commit()} | requests |"
    return "\n".join(
        [head, "|---|---|", *rows, f"| the longest wait of a POST, a start among it | {trickle.longest_s:.1f} s |"]
    )


if __name__ == "__main__":
    main()
