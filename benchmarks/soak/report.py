"""The report of a soak: what was asked and how it ended, the longest silences, what each process holds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from benchmarks.soak.faults import Fault
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.processes import Growth, Holding

SHOWN = 12


def outcomes_table(answers: Sequence[Answer]) -> list[str]:
    lines = [
        f"| client | sent | {' | '.join(outcome.value for outcome in Outcome)} | p50 | p95 |",
        "|---|" + "---:|" * 8,
    ]
    for client in sorted({answer.client for answer in answers}):
        of = [answer for answer in answers if answer.client == client]
        counts = Counter(answer.outcome for answer in of)
        took = sorted(answer.took_s for answer in of if answer.outcome is Outcome.RIGHT) or [0.0]
        cells = [str(counts[outcome]) for outcome in Outcome]
        p95 = took[len(took) * 95 // 100]
        lines.append(f"| {client} | {len(of)} | {' | '.join(cells)} | {_ms(statistics.median(took))} | {_ms(p95)} |")
    return lines


def silences_table(answers: Sequence[Answer], faults: Sequence[Fault]) -> list[str]:
    """The longest time without any right answer of a plain client, after each kind of fault."""
    ends = sorted(a.began + a.took_s for a in answers if a.client == "plain" and a.outcome is Outcome.RIGHT)
    gaps = list(pairwise(ends))
    lines = ["| fault | times | longest silence | median |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(fault.name for fault in faults):
        longest = [
            max((end - start for start, end in gaps if start < fault.at + 60 and end > fault.at), default=0.0)
            for fault in faults
            if fault.name == name and fault.hit
        ]
        if longest:
            lines.append(f"| {name} | {len(longest)} | {max(longest):.1f} s | {statistics.median(longest):.1f} s |")
        else:
            lines.append(f"| {name} | 0 | - | - |")
    return lines


def holdings_table(before: Mapping[str, list[Holding]], after: Mapping[str, list[Holding]]) -> list[str]:
    lines = ["| processes | at the start | at the end |", "|---|---:|---:|"]
    for kind in sorted({*before, *after}):
        lines.append(f"| {kind} | {_holds(before.get(kind, []))} | {_holds(after.get(kind, []))} |")
    return lines


def growth_table(growths: Iterable[Growth]) -> list[str]:
    """At the same age, of the first process of its kind and of the last; or of one, from a minute on."""
    lines = ["| process | before | after | |", "|---|---:|---:|---|"]
    for one in growths:
        cells = [
            f"{look.mib:.0f} MiB, {look.handles} files, {look.age_s:.0f} s old" for look in (one.before, one.after)
        ]
        lines.append(f"| {one.kind} | {cells[0]} | {cells[1]} | {'**grows**' if one.is_leak else ''} |")
    return lines


def what_went_wrong(answers: Iterable[Answer]) -> list[str]:
    """The most frequent of what was said, for each client."""
    said = Counter((a.client, a.outcome.value, a.why[:110]) for a in answers if a.outcome is not Outcome.RIGHT)
    return [f"- {count} x {client}, {outcome}: `{why}`" for (client, outcome, why), count in said.most_common(SHOWN)]


def _holds(holdings: Sequence[Holding]) -> str:
    if not holdings:
        return "-"
    each = ", ".join(f"{one.mib:.0f} MiB / {one.handles}" for one in sorted(holdings, key=lambda one: -one.mib)[:4])
    return f"{len(holdings)}: {each}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
