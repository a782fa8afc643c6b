"""`EventCounters`: Prometheus counters, among Ray's metrics, of decodes in tiles, repeated in float32 or out of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter

if TYPE_CHECKING:
    from remote_vae_serve.engine.base import Event

COUNTERS: dict[Event, tuple[str, str]] = {
    "tiled": ("remote_vae_tiled_total", "Decodes and encodes in tiles, for lack of memory."),
    "out_of_memory": ("remote_vae_oom_total", "Decodes and encodes that ran out of memory."),
    "float32": ("remote_vae_float32_retries_total", "Decodes and encodes that were repeated in float32."),
}
"""Name and description for each event. Ray exports them with the prefix `ray_`, and adds `_total` only where a name lacks it."""


class EventCounters:
    """The counters of one model, with its name as the tag `model`.

    The counter `remote_vae_events` with the event as a tag, exported as `ray_remote_vae_events_total`, is what there was before;
    dashboards may read it.
    """

    def __init__(self, model: str) -> None:
        self._tags = {"model": model}
        self._counters = {event: Counter(*about, tag_keys=("model",)) for event, about in COUNTERS.items()}
        self._events = Counter(
            "remote_vae_events",
            description="Deprecated: remote_vae_tiled_total, remote_vae_oom_total and remote_vae_float32_retries_total in one.",
            tag_keys=("model", "event"),
        )

    def count(self, event: Event) -> None:
        """Count one event."""
        self._counters[event].inc(tags=self._tags)
        self._events.inc(tags=self._tags | {"event": event})
