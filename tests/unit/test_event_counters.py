"""What an operator counts: a Prometheus counter for each event, and the one that had them all before."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any, get_args

import pytest

from remote_vae_serve.engine.base import Event
from remote_vae_serve.replica import event_counters
from remote_vae_serve.replica.event_counters import COUNTERS, EventCounters


def test_each_event_has_a_counter_of_a_prometheus_name() -> None:
    assert set(COUNTERS) == set(get_args(Event))
    assert all(name.startswith("remote_vae_") and name.endswith("_total") for name, _ in COUNTERS.values())


def test_an_event_is_counted_by_its_own_counter_and_by_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Tally[tuple[str, tuple[tuple[str, str], ...]]] = Tally()

    class Recording:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def inc(self, tags: dict[str, Any]) -> None:
            assert set(tags) == set(self.tag_keys)
            counted[self.name, tuple(tags.items())] += 1

    monkeypatch.setattr(event_counters, "Counter", Recording)
    counters = EventCounters("sd")
    counters.count("tiled")
    counters.count("out_of_memory")
    counters.count("tiled")
    assert counted == {
        ("remote_vae_tiled_total", (("model", "sd"),)): 2,
        ("remote_vae_oom_total", (("model", "sd"),)): 1,
        ("remote_vae_events", (("model", "sd"), ("event", "tiled"))): 2,
        ("remote_vae_events", (("model", "sd"), ("event", "out_of_memory"))): 1,
    }
