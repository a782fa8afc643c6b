"""Large bodies that are held back, and large ones that are refused: the memory of each process meanwhile and after; as a table.

    python -m benchmarks.held_bodies [--haproxy] [--direct] [--out benchmarks/results/held_bodies.md]

A hundred clients send 100 MiB each, all but the last byte, and wait; then nine bodies of 100 MiB that are refused, one after the
other. Everything is as shipped, under the launcher; the model is a fake one.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import requests

from benchmarks.soak.processes import holdings
from benchmarks.under_launcher import LocalServer, door, fake_model, serve

MODEL = "held"
CLIENTS, SIZE, REFUSED = 100, 100 * 2**20, 9
HELD_S, BACK_S = 20.0, 5.0
QUERY = "shape=1&shape=4&shape=8&shape=8&dtype=float32"
HELD_QUERY = "shape=1&shape=4&shape=2560&shape=2560&dtype=float32"
"""Of `SIZE` bytes: what a query tells to be wrong is refused before a byte of it is read."""
PIECE = bytes(2**20)


class Memory:
    """The most that a process of each kind holds of its own (`soak.processes`), in MiB, as long as it looks."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server
        self._over = threading.Event()
        self.most: dict[str, float] = {}
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            for kind, mib in now(self._server).items():
                self.most[kind] = max(mib, self.most.get(kind, 0.0))

    def stop(self) -> Mapping[str, float]:
        self._over.set()
        self._thread.join()
        return self.most


def now(server: LocalServer) -> Mapping[str, float]:
    """MiB of the largest process of each kind."""
    return {kind: max(one.mib for one in found) for kind, found in holdings(server.processes()).items()}


def hold(server: LocalServer, answers: list[bytes]) -> None:
    """One client: all but the last byte, and patience."""
    parts = urlsplit(server.url)
    head = f"POST /{MODEL}?{HELD_QUERY} HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\n\r\n".encode()
    connection = socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=HELD_S)
    with connection, suppress(OSError):
        connection.sendall(head)
        for _ in range(SIZE // len(PIECE) - 1):
            connection.sendall(PIECE)
        connection.sendall(PIECE[:-1])
        answers.append(connection.recv(12))
        return
    answers.append(b"cut")


def pieces() -> Iterator[bytes]:
    """A body that does not say how long it is: it is read, and then refused."""
    yield from (PIECE for _ in range(SIZE // len(PIECE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--direct", action="store_true", help="the model's own path instead of the ingress")
    parser.add_argument("--out", type=Path, help="also append the table there")
    args = parser.parse_args()

    with serve([fake_model(MODEL, args.direct, {})], args.haproxy) as server:
        url = f"{server.url}/{MODEL}?{QUERY}"
        assert requests.post(url, data=bytes(1024), timeout=60).status_code == 200
        before = now(server)
        memory, answers = Memory(server), list[bytes]()
        clients = [threading.Thread(target=hold, args=(server, answers)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(HELD_S / 2)
        served = requests.post(url, data=bytes(1024), timeout=60).status_code
        for client in clients:
            client.join()
        held = memory.stop()
        time.sleep(BACK_S)
        back = now(server)
        codes = [requests.post(url, data=pieces(), timeout=120).status_code for _ in range(REFUSED)]
        time.sleep(BACK_S)
        after = now(server)
    kinds = sorted(set(before) - {"Ray"})
    rows = [
        f"| {kind} | {' | '.join(f'{look.get(kind, 0):.0f}' for look in (before, held, back, after))} |"
        for kind in kinds
    ]
    text = "\n".join([
        f"| {door(args.direct, args.haproxy)}; MiB of the largest process | before | {CLIENTS} held back, most | "
        f"{BACK_S:g} s later | after {REFUSED} refused, {BACK_S:g} s later |",
        "|---|---:|---:|---:|---:|",
        *rows, "",
        f"A small one meanwhile: {served}. The held ones: {dict(Counter(answers))}; the refused ones: {dict(Counter(codes))}.",
    ]) + "\n"  # fmt: skip
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
