"""Long decodes in flight while their server is stopped, or their model scaled down: how many of them are cut; as a table.

    python -m benchmarks.stops [--times 10] [--decode-s 35] [--haproxy] [--out benchmarks/results/stops.md]

Two models of a fake engine of a fixed time, one behind the ingress and one at a path of its own; everything else is as shipped,
under the launcher. Serve's own limit for a replica that is to go is 20 s. Requests are sent once, without retries.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from benchmarks.under_launcher import LocalServer, fake_model, serve

DOORS = {"slow": "ingress", "slow-direct": "direct"}
REPLICAS = 2
OF_TWO = {"deployments": [{"name": "VAE", "num_replicas": REPLICAS}]}
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32"}
BODY = bytes(4 * 4 * 64)
BEGUN_S = 3.0


def send(url: str) -> str:
    """How one request ended."""
    try:
        answer = requests.post(url, params=QUERY, data=BODY, timeout=300)
    except requests.RequestException as error:
        return type(error).__name__
    return "answered" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:60]}"


def while_in_flight(server: LocalServer, happens: Callable[[], object]) -> Counter[str]:
    """What became of a decode on each replica when that happened in the middle of it."""
    with ThreadPoolExecutor(REPLICAS * len(DOORS)) as pool:
        sent = [(name, pool.submit(send, f"{server.url}/{name}")) for name in DOORS for _ in range(REPLICAS)]
        time.sleep(BEGUN_S)
        happens()
        return Counter(f"{DOORS[name]}: {future.result()}" for name, future in sent)


def stopped(make: Callable[[], LocalServer]) -> tuple[Counter[str], float]:
    """By SIGTERM to the launcher's whole process group, as a supervisor sends it; and the seconds until it had ended."""
    with make() as server:
        began = time.monotonic()
        ended = while_in_flight(server, lambda: os.killpg(server.launched.pid, signal.SIGTERM))
        server.launched.wait(120)
        return ended, time.monotonic() - began - BEGUN_S


def scaled_down(server: LocalServer) -> Counter[str]:
    """From two replicas to one, and back again once that is done."""

    def to(count: int) -> Callable[[], None]:
        def change(config: dict[str, Any]) -> None:
            for application in config["applications"]:
                if application["name"] in DOORS:
                    application["deployments"][0]["num_replicas"] = count

        return lambda: server.deploy(change)

    ended = while_in_flight(server, to(1))
    wait_for(server, 1)
    to(REPLICAS)()
    wait_for(server, REPLICAS)
    return ended


def wait_for(server: LocalServer, count: int) -> None:
    while any(len(server.processes(f"ServeReplica:{name}:")) != count for name in DOORS):
        time.sleep(0.5)
    time.sleep(BEGUN_S)  # until the router has heard of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--decode-s", type=float, default=35.0)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--out", type=Path, help="also append the table there")
    args = parser.parse_args()

    def make() -> LocalServer:
        models = [
            fake_model(name, door == "direct", {"decode_s": args.decode_s}, batching="off") | OF_TWO
            for name, door in DOORS.items()
        ]
        return serve(models, args.haproxy)

    stops = []
    for number in range(args.times):
        stops.append(stopped(make))
        print(number, stops[-1], flush=True)
    with make() as server:
        downs = Counter[str]()
        for number in range(args.times):
            downs += (ended := scaled_down(server))
            print(number, ended, flush=True)
    by_signal = sum((ended for ended, _ in stops), Counter[str]())
    proxy = "HAProxy" if args.haproxy else "Python proxy"
    text = "\n".join([
        f"| {proxy}: {REPLICAS} decodes of {args.decode_s:g} s at each door, {args.times} times | ended |",
        "|---|---|",
        f"| SIGTERM to the whole group | {said(by_signal)}; the server was gone after at most {max(s for _, s in stops):.0f} s |",
        f"| from {REPLICAS} replicas to one | {said(downs)} |",
    ]) + "\n"  # fmt: skip
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")


def said(ended: Counter[str]) -> str:
    return ", ".join(f"{how} {times}" for how, times in sorted(ended.items()))


if __name__ == "__main__":
    main()
