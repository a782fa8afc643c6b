"""A client with one request at a time beside one that sends two hundred: each gets its turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import requests
from ray import serve

from limits import WAIT_S
from running_cluster import Cluster
from samples import latents

pytestmark = pytest.mark.slow  # seconds of steady load
DECODE_S = 0.4
WINDOW_S = 10.0
GREEDY = 200
Z = latents(1, 4, 8, 8)
QUERY = {"shape": list(Z.shape), "dtype": "float32"}


@pytest.fixture
def fair(bare_cluster: Cluster) -> Iterator[Cluster]:
    """`batching: off`, so that capacity is what it says: one decode after the other."""
    bare_cluster.deploy("fair", source="x", device="cpu", num_gpus=0, fake={"decode_s": DECODE_S}, batching="off")
    yield bare_cluster
    serve.delete("fair")


class Client:
    """Asks again and again from an address of its own; `X-Forwarded-For` is believed on loopback."""

    def __init__(self, url: str, address: str, at_once: int) -> None:
        self.served: list[float] = []
        self.refused: list[float] = []
        self._over = threading.Event()
        self._url, self._headers = f"{url}/fair", {"X-Forwarded-For": address}
        self._threads = [threading.Thread(target=self._ask) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with requests.Session() as session:
            while not self._over.is_set():
                answer = session.post(
                    self._url, params=QUERY, data=Z.numpy().tobytes(), headers=self._headers, timeout=WAIT_S
                )
                if answer.status_code == 200:
                    self.served.append(time.monotonic())
                    continue
                assert answer.json()["code"] == "overloaded", answer.text
                self.refused.append(float(answer.headers["retry-after"]))
                self._over.wait(self.refused[-1])

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def served_in_a_window(url: str) -> int:
    light = Client(url, "203.0.113.1", 1)
    time.sleep(WINDOW_S)
    light.stop()
    return len(light.served)


def test_a_light_client_gets_a_third_of_what_it_gets_alone_beside_one_with_two_hundred_requests(fair: Cluster) -> None:
    alone = served_in_a_window(fair.url)
    greedy = Client(fair.url, "203.0.113.2", GREEDY)
    try:
        give_up = time.monotonic() + WAIT_S
        while len(greedy.refused) < GREEDY / 2:  # on a busy machine the proxy takes seconds to take in so many at once
            assert time.monotonic() < give_up, "there was no queue to share"
            time.sleep(DECODE_S)
        beside = served_in_a_window(fair.url)
    finally:
        greedy.stop()
    assert beside >= alone / 3, f"alone {alone}, beside {beside}, the other {len(greedy.served)}"
    assert greedy.served
