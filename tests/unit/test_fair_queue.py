"""The queue before the device: clients take turns, and one's own requests keep their order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from remote_vae_serve.replica.device_worker import FairQueue


@dataclass(frozen=True, eq=False)
class Job:
    name: str

    @property
    def client(self) -> str:
        return self.name[0]


def queue_of(*names: str) -> tuple[FairQueue, dict[str, Job]]:
    queue: FairQueue = FairQueue()
    jobs = {name: Job(name) for name in names}
    for job in jobs.values():
        queue.append(job)
    return queue, jobs


def taken(queue: FairQueue) -> str:
    names = []
    while queue:
        names.append(queue.popleft().name)
    return " ".join(names)


def test_clients_take_turns_and_their_own_requests_keep_their_order() -> None:
    names = ("a1", "a2", "a3", "a4", "b1", "c1", "c2")
    queue, _ = queue_of(*names)
    assert " ".join(job.name for job in queue) == "a1 b1 c1 a2 c2 a3 a4"
    assert taken(queue) == "a1 b1 c1 a2 c2 a3 a4"


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("client", ["a", "b", "c", "l"])
def test_what_a_request_waits_for_is_the_turns_before_its_own(client: str, turns: int) -> None:
    """Not all that wait: who has one at a time waits for one of each other."""
    queue, _ = queue_of("a1", "a2", "a3", "a4", "b1", "c1", "c2")
    for _ in range(turns):
        queue.popleft()
    before = sorted(job.name for job in queue.before(client))
    queue.append(Job(f"{client}9"))  # what really comes before it is what is taken before it
    assert before == sorted(taken(queue).split(f"{client}9")[0].split())


def test_who_asks_while_another_is_served_comes_before_that_ones_next() -> None:
    """Else a client with one request at a time, beside a greedy one, waits for two of it: its share is a third, not a half."""
    queue, _ = queue_of("g1", "g2", "g3")
    assert queue.popleft().name == "g1"
    queue.append(Job("l1"))
    assert [job.name for job in queue.before("m")] == ["l1"]
    assert taken(queue) == "l1 g2 g3"


def test_new_ones_without_end_starve_nobody() -> None:
    queue, _ = queue_of("g1", "g2")
    queue.popleft()
    order = []
    for number in range(4):
        queue.append(Job(f"{number}"))
        queue.append(Job(f"{number + 4}"))
        order.append(queue.popleft().name)
    assert order == ["0", "4", "g2", "1"]


def test_who_comes_again_after_each_answer_waits_for_one_request_of_each_other() -> None:
    queue, _ = queue_of(*(f"g{number}" for number in range(200)), "l0")
    order = []
    for number in range(1, 6):
        for _ in range(2):
            job = queue.popleft()
            order.append(job.client)
        queue.append(Job(f"l{number}"))
    assert order == ["g", "l"] * 5


def test_what_is_taken_out_costs_nobody_a_turn() -> None:
    queue, jobs = queue_of("a1", "a2", "b1", "b2")
    queue.remove(jobs["a2"])
    queue.remove(jobs["b1"])
    assert taken(queue) == "a1 b2"
    with pytest.raises(ValueError, match="not in"):
        queue.remove(jobs["a1"])
    with pytest.raises(IndexError):
        queue.popleft()
