"""How fast a server answers: `measure`, and its `Report`."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remote_vae.errors import RemoteVAEError
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import RawTensor, from_array


@dataclass
class Report:
    """What was measured.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: milliseconds of each request that was answered, as the client saw them.
        stages: milliseconds of each stage, as the server says in `server-timing`.
        errors: the others, in the order they failed.
    """

    seconds: float = 0.0
    bytes_received: int = 0
    latencies: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    errors: list[RemoteVAEError] = field(default_factory=list)

    def as_fields(self) -> dict[str, Any]:
        """For machines; milliseconds end in `_ms`."""
        return {
            "requests": len(self.latencies) + len(self.errors),
            "errors": dict(Counter(error.code for error in self.errors)),
            "seconds": round(self.seconds, 3),
            "per_second": round(len(self.latencies) / self.seconds, 3),
            "received_mib": round(self.bytes_received / 2**20, 3),
            "latency_ms": _spread(self.latencies),
            "server_ms": {stage: _spread(values) for stage, values in self.stages.items()},
        }

    def as_text(self) -> str:
        """For people."""
        fields = self.as_fields()
        lines = [f"{fields['requests']} requests in {self.seconds:.2f} s: {fields['per_second']:.2f} answers a second"]
        rows = {"latency": fields["latency_ms"]} | {
            f"  {stage}": spread for stage, spread in fields["server_ms"].items()
        }
        if self.latencies:
            lines.append(f"{'ms':<12}" + "".join(f"{name:>10}" for name in fields["latency_ms"]))
            lines += [
                f"{name:<12}" + "".join(f"{ms:>10.1f}" for ms in spread.values()) for name, spread in rows.items()
            ]
        for code, count in fields["errors"].items():
            example = next(error.message for error in self.errors if error.code == code)
            lines.append(f"{count} failed with {code}: {example}")
        return "\n".join(lines)


def measure(send: Callable[[], Result], requests: int, concurrency: int, tick: Callable[[], None]) -> Report:
    """Send `requests` requests, `concurrency` at a time, and call `tick` after each."""
    report, lock = Report(), threading.Lock()

    def one(_: int) -> None:
        started = time.perf_counter()
        try:
            result = send()
        except RemoteVAEError as error:
            with lock:
                report.errors.append(error)
                tick()
            return
        took = (time.perf_counter() - started) * 1000
        with lock:
            report.latencies.append(took)
            report.bytes_received += result.data.nbytes
            for stage, ms in result.provenance.timings:
                report.stages.setdefault(stage, []).append(ms)
            tick()

    started = time.perf_counter()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="remote-vae-bench")
    try:
        for _ in pool.map(one, range(requests)):
            pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a Ctrl-C nobody waits for answers
    report.seconds = time.perf_counter() - started
    return report


def noise(shape: tuple[int, ...], dtype: str) -> RawTensor:
    """Latents as a generator begins with them: the same each time, of any dtype that travels."""
    normal = np.random.default_rng(0).standard_normal(shape, np.float32)
    if dtype != "bfloat16":
        return from_array(normal.astype(dtype))
    upper = (normal.view(np.uint32) >> 16).astype("<u2")  # cut off, not rounded, which noise does not mind
    return RawTensor(upper.reshape(-1).view(np.uint8), dtype, shape)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    median, p90, p99 = np.percentile(values, (50, 90, 99))
    spread = {"median": median, "p90": p90, "p99": p99, "least": min(values), "most": max(values)}
    return {name: round(float(ms), 3) for name, ms in spread.items()}
