"""The report of a soak: what was asked and how it ended, the longest silences, what each process holds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from benchmarks.soak.faults import Fault
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.processes import Growth, Holding

SHOWN = 12
AFTER_S = 10.0
"""A silence that begins so long after a fault is another's."""

LIMITS_S = {"ingress killed": 2.0, "proxy killed": 6.0, "HAProxy killed": 6.0, "HAProxy's manager killed": 6.0}
LIMITED_DOORS = ("direct", "ingress")
"""Where a model has two replicas: of an only one, the next has to be started."""


def outcomes_table(answers: Sequence[Answer]) -> list[str]:
    lines = [
        f"| client | door | sent | {' | '.join(outcome.value for outcome in Outcome)} | p50 | p95 |",
        "|---|---|" + "---:|" * 8,
    ]
    for client, door in sorted({(answer.client, answer.door) for answer in answers}):
        of = [answer for answer in answers if (answer.client, answer.door) == (client, door)]
        counts = Counter(answer.outcome for answer in of)
        took = sorted(answer.took_s for answer in of if answer.outcome is Outcome.RIGHT) or [0.0]
        cells = [str(counts[outcome]) for outcome in Outcome]
        p95 = took[len(took) * 95 // 100]
        lines.append(
            f"| {client} | {door} | {len(of)} | {' | '.join(cells)} | {_ms(statistics.median(took))} | {_ms(p95)} |"
        )
    return lines


def silences_table(answers: Sequence[Answer], faults: Sequence[Fault]) -> list[str]:
    """The longest time without any right answer of a plain client, after each kind of fault, by door."""
    doors = sorted({answer.door for answer in answers})
    headings = "".join(f" longest silence, {door} | median |" for door in doors)
    lines = [f"| fault | times |{headings}", "|---|" + "---:|" * (1 + 2 * len(doors))]
    gaps = {door: _gaps(answer for answer in answers if answer.door == door) for door in doors}
    for name in dict.fromkeys(fault.name for fault in faults):
        hits = [fault for fault in faults if fault.name == name and fault.hit]
        cells = [f" {max(each):.1f} s | {statistics.median(each):.1f} s |" if hits else " - | - |"
                 for each in ([_silence(gaps[door], fault, faults) for fault in hits] for door in doors)]  # fmt: skip
        lines.append(f"| {name} | {len(hits)} |{''.join(cells)}")
    return lines


def _gaps(answers: Iterable[Answer]) -> list[tuple[float, float]]:
    """From one right answer of a plain client to the next."""
    return list(
        pairwise(sorted(a.began + a.took_s for a in answers if a.client == "plain" and a.outcome is Outcome.RIGHT))
    )


def _silence(gaps: Iterable[tuple[float, float]], fault: Fault, faults: Sequence[Fault]) -> float:
    """Until the next fault: what goes on from there is the next one's."""
    next_at = min((other.at for other in faults if other.hit and other.at > fault.at), default=math.inf)
    during = (
        min(end, next_at) - start for start, end in gaps if start < min(fault.at + AFTER_S, next_at) and end > fault.at
    )
    return max(during, default=0.0)


def beyond(answers: Sequence[Answer], faults: Sequence[Fault]) -> list[str]:
    """What is worse than it may be: silences that are too long, and what a plain client lost while nothing was killed."""
    gaps = {door: _gaps(answer for answer in answers if answer.door == door) for door in LIMITED_DOORS}
    found = [
        f"- {silence:.1f} s of silence, {door}, after {fault.name}; at most {LIMITS_S[fault.name]:g} s"
        for fault in faults
        for door in LIMITED_DOORS
        if fault.hit and (silence := _silence(gaps[door], fault, faults)) > LIMITS_S.get(fault.name, math.inf)
    ]
    deaths = [fault.at for fault in faults if fault.hit and fault.name.endswith("killed")]
    unexplained = [
        answer
        for answer in answers
        if (answer.client, answer.outcome) == ("plain", Outcome.LOST)
        and not any(answer.began - AFTER_S < at < answer.began + answer.took_s for at in deaths)
    ]
    return found + [
        f"- lost by a plain client while nothing was killed: {one.to_json()}" for one in unexplained[:SHOWN]
    ]


def holdings_table(before: Mapping[str, list[Holding]], after: Mapping[str, list[Holding]]) -> list[str]:
    lines = ["| processes | at the start | at the end |", "|---|---:|---:|"]
    for kind in sorted({*before, *after}):
        lines.append(f"| {kind} | {_holds(before.get(kind, []))} | {_holds(after.get(kind, []))} |")
    return lines


def growth_table(growths: Iterable[Growth]) -> list[str]:
    """After the same time in use, of the others of its kind and of the last; of one that lived all along, in its second half."""
    lines = ["| process | before | after | |", "|---|---:|---:|---|"]
    for one in growths:
        cells = [
            f"{look.mib:.0f} MiB, {look.handles} files, {look.used_s:.0f} s in use" for look in (one.before, one.after)
        ]
        lines.append(f"| {one.kind} | {cells[0]} | {cells[1]} | {'**grows**' if one.is_leak else ''} |")
    return lines


def what_went_wrong(answers: Iterable[Answer]) -> list[str]:
    """The most frequent of what was said, for each client."""
    said = Counter((a.client, a.door, a.outcome.value, a.why[:110]) for a in answers if a.outcome is not Outcome.RIGHT)
    return [
        f"- {count} x {client}, {door}, {outcome}: `{why}`"
        for (client, door, outcome, why), count in said.most_common(SHOWN)
    ]


def _holds(holdings: Sequence[Holding]) -> str:
    if not holdings:
        return "-"
    each = ", ".join(f"{one.mib:.0f} MiB / {one.handles}" for one in sorted(holdings, key=lambda one: -one.mib)[:4])
    return f"{len(holdings)}: {each}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
