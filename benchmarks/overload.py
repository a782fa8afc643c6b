"""Overload: requests at five times the capacity, and one client beside another with 200 requests at once; as a table.

    python -m benchmarks.overload [--seconds 120] [--decode-s 0.1] [--replicas 1] [--haproxy] [--direct] [--out overload.md]

A fake engine of a fixed time and no batches, so that capacity is known; everything else is as shipped, under the launcher.
`X-Forwarded-For`, which is believed on loopback, makes clients of threads.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests

from benchmarks.under_launcher import LocalServer, door, fake_model, serve

TIMES = 5
CLIENTS = 20
GREEDY = 200
THREADS = 400
FAIR_S = 20.0
NEAR_S = 2.0
"""Who was let in within so much of a refusal waited for what the refused one would have had to wait."""
MODEL = "overloaded"
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32"}
BODY = bytes(4 * 4 * 64)


@dataclass(frozen=True)
class Reply:
    """One request: seconds on the monotonic clock, status, and what `Retry-After` says, in seconds."""

    sent: float
    took_s: float
    status: int
    retry_after: float | None

    @property
    def is_refusal(self) -> bool:
        """In the agreed form."""
        return self.status == 503 and self.retry_after is not None


def ask(session: requests.Session, url: str, client: str) -> Reply:
    began = time.monotonic()
    try:
        answer = session.post(url, params=QUERY, data=BODY, headers={"x-forwarded-for": client}, timeout=60)
    except requests.RequestException:
        return Reply(began, time.monotonic() - began, 0, None)
    after = answer.headers.get("retry-after")
    return Reply(began, time.monotonic() - began, answer.status_code, None if after is None else float(after))


class Closed:
    """A client that has a number of requests in flight, and sends the next when one is answered; told to wait, it waits."""

    def __init__(self, url: str, client: str, at_once: int) -> None:
        self.replies: list[Reply] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url, client), daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str, client: str) -> None:
        with requests.Session() as session:
            while not self._over.is_set():
                reply = ask(session, url, client)
                self.replies.append(reply)
                if reply.status != 200:
                    self._over.wait(reply.retry_after or 1)

    def stop(self) -> Sequence[Reply]:
        self._over.set()
        for thread in self._threads:
            thread.join()
        return self.replies


def served_for(seconds: float, url: str, client: str, at_once: int) -> int:
    """How many requests of a client were answered in that time."""
    closed = Closed(url, client, at_once)
    until = time.monotonic() + seconds
    time.sleep(seconds)
    return sum(reply.status == 200 and reply.sent + reply.took_s < until for reply in closed.stop())


def flood(url: str, rate: float, seconds: float) -> list[Reply]:
    """Requests at a rate, whatever becomes of them, of `CLIENTS` clients in turn."""
    local = threading.local()

    def one(number: int) -> Reply:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        return ask(local.session, url, f"203.0.113.{number % CLIENTS + 1}")

    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        asked = []
        for number in range(int(rate * seconds)):
            time.sleep(max(began + number / rate - time.monotonic(), 0))
            asked.append(pool.submit(one, number))
        return [future.result() for future in asked]


def look(url: str, every_s: float, over: threading.Event) -> list[float]:
    """Seconds that each GET took."""
    took = []
    with requests.Session() as session:
        while not over.wait(every_s):
            began = time.monotonic()
            session.get(url, timeout=30).raise_for_status()
            took.append(time.monotonic() - began)
    return took


def p95(values: Sequence[float]) -> float:
    return sorted(values)[len(values) * 95 // 100] if values else float("nan")


def advice_against_need(replies: Sequence[Reply]) -> list[float]:
    """Of each refusal, what it was told to wait over what those waited who were let in at about that time."""
    served = [reply for reply in replies if reply.status == 200]
    ratios = []
    for reply in replies:
        if reply.retry_after is None:
            continue
        near = [other.took_s for other in served if abs(other.sent - reply.sent) < NEAR_S]
        if near:
            ratios.append(reply.retry_after / max(statistics.median(near), 1.0))  # it is in whole seconds, 1 at least
    return ratios


def measure(server: LocalServer, url: str, seconds: float, capacity_told: float) -> list[str]:
    alone = served_for(FAIR_S, url, "198.51.100.1", 1)
    capacity = served_for(FAIR_S, url, "198.51.100.2", 8) / FAIR_S
    over = threading.Event()
    health: list[float] = []
    looking = threading.Thread(target=lambda: health.extend(look(f"{server.url}/health", 0.1, over)))
    looking.start()
    began = time.monotonic()
    replies = flood(url, TIMES * capacity_told, seconds)
    over.set()
    looking.join()
    served = [reply for reply in replies if reply.status == 200 and reply.sent + reply.took_s < began + seconds]
    refused = [reply for reply in replies if reply.is_refusal]
    others = Counter(reply.status for reply in replies if reply.status != 200 and not reply.is_refusal)
    ratios = advice_against_need(replies)
    greedy = Closed(url, "198.51.100.4", GREEDY)
    time.sleep(2)
    beside = served_for(FAIR_S, url, "198.51.100.1", 1)
    greedy.stop()
    within = sum(0.5 <= ratio <= 2 for ratio in ratios) / max(len(ratios), 1)
    return [
        f"| capacity, eight requests at a time | {capacity:.1f} a second |",
        f"| sent in {seconds:g} s, at {TIMES} times {capacity_told:g} a second | {len(replies)} |",
        f"| answered in that time | {len(served)}, {len(served) / seconds / capacity:.2f} of the capacity |",
        f"| refused | {len(refused)}; median {1000 * _median(refused):.0f} ms, p95 {1000 * _p95(refused):.0f} ms |",
        f"| neither, by status | {dict(others) or 0} |",
        f"| `/health` meanwhile | {len(health)} times; p95 {1000 * p95(health):.0f} ms |",
        f"| `Retry-After` over what those let in waited | median {statistics.median(ratios or [0]):.2f}, "
        f"{100 * within:.0f} % within a factor of two |",
        f"| a client with one request at a time, alone, {FAIR_S:g} s | {alone} |",
        f"| the same beside one with {GREEDY} | {beside}, {beside / alone:.2f} of it |",
    ]  # fmt: skip


def _median(replies: Sequence[Reply]) -> float:
    return statistics.median([reply.took_s for reply in replies] or [float("nan")])


def _p95(replies: Sequence[Reply]) -> float:
    return p95([reply.took_s for reply in replies])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--decode-s", type=float, default=0.1, help="what one decode takes: capacity is its inverse")
    parser.add_argument(
        "--replicas", type=int, default=1, help="of several, one hands back what another could begin sooner"
    )
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--direct", action="store_true", help="the model's own path instead of the ingress")
    parser.add_argument("--out", type=Path, help="also append the table there")
    args = parser.parse_args()

    model = fake_model(MODEL, args.direct, {"decode_s": args.decode_s}, batching="off")
    model |= {"deployments": [{"name": "VAE", "num_replicas": args.replicas}]}
    with serve([model], args.haproxy) as server:
        rows = measure(server, f"{server.url}/{MODEL}", args.seconds, args.replicas / args.decode_s)
    title = f"{door(args.direct, args.haproxy)}{f', {args.replicas} replicas' if args.replicas > 1 else ''}"
    text = "\n".join([f"| {title} | |", "|---|---|", *rows]) + "\n"
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
