"""Long decodes in flight while their server is stopped, or their model scaled down: how many of them are cut; as a table.

    python benchmarks/stops.py [--times 10] [--decode-s 35] [--haproxy] [--direct] [--out benchmarks/results/stops.md]

A fake engine of a fixed time; everything else is as shipped, under the launcher. Serve's own limit for a replica that is to go
is 20 s. Requests are sent once, without retries.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from local_server import LocalServer

MODEL = "slow"
REPLICAS = 2
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
    with ThreadPoolExecutor(REPLICAS) as pool:
        sent = [pool.submit(send, f"{server.url}/{MODEL}") for _ in range(REPLICAS)]
        time.sleep(BEGUN_S)
        happens()
        return Counter(future.result() for future in sent)


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
            config["applications"][-1]["deployments"][0]["num_replicas"] = count

        return lambda: server.deploy(change)

    ended = while_in_flight(server, to(1))
    wait_for(server, 1)
    to(REPLICAS)()
    wait_for(server, REPLICAS)
    return ended


def wait_for(server: LocalServer, count: int) -> None:
    while len(server.processes(f"ServeReplica:{MODEL}:")) != count:
        time.sleep(0.5)
    time.sleep(BEGUN_S)  # until the router has heard of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--decode-s", type=float, default=35.0)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--direct", action="store_true", help="the model's own path instead of the ingress")
    parser.add_argument("--out", type=Path, help="also append the table there")
    args = parser.parse_args()

    def one_model(config: dict[str, Any]) -> None:
        model = {
            "name": MODEL,
            "route_prefix": f"/{MODEL}" if args.direct else None,
            "import_path": "remote_vae_serve.app:vae",
            "args": {"source": "nowhere", "fake": {"decode_s": args.decode_s}, "num_cpus": 0, "batching": "off"},
            "deployments": [{"name": "VAE", "num_replicas": REPLICAS}],
        }
        config["applications"] = [app for app in config["applications"] if app["name"] == "remote-vae"] + [model]

    def make() -> LocalServer:
        command = (sys.executable, "-m", "remote_vae_serve.cli", "run", *(["--haproxy"] if args.haproxy else []))
        return LocalServer(models=(MODEL,), change=one_model, command=command)

    stops = [stopped(make) for _ in range(args.times)]
    with make() as server:
        downs = sum((scaled_down(server) for _ in range(args.times)), Counter[str]())
    by_signal = sum((ended for ended, _ in stops), Counter[str]())
    door = f"{'direct door' if args.direct else 'ingress'}, {'HAProxy' if args.haproxy else 'Python proxy'}"
    text = "\n".join([
        f"| {door}: {REPLICAS} decodes of {args.decode_s:g} s, {args.times} times | ended |",
        "|---|---|",
        f"| SIGTERM to the whole group | {dict(by_signal)}; the server was gone after at most {max(s for _, s in stops):.0f} s |",
        f"| from {REPLICAS} replicas to one | {dict(downs)} |",
    ]) + "\n"  # fmt: skip
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
