"""What the server's processes hold: memory and file handles, by what they are; and which of them grows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

OURS = {
    "ingress": re.compile(r"ServeReplica:remote-vae"),
    "real replica": re.compile(r"ServeReplica:demo:"),
    "replica": re.compile(r"ServeReplica:"),
    "proxy": re.compile(r"ray::ProxyActor"),
    "server": re.compile(r"remote_vae_serve\.launcher"),
    "launcher": re.compile(r"remote_vae_serve\.cli|remote-vae-serve"),
}
RAY, HAPROXY = "Ray", "HAProxy"
THEIRS = {HAPROXY: re.compile(r"haproxy -")}
"""Listed and not judged: each reload of its configuration starts it anew, and its files are the connections of the moment."""
SETTLED_S = 60.0
"""After its first requests a process has what it keeps."""
SAME_S, OLD_S = 60.0, 900.0
"""One that nothing in use for as long can be compared with is judged by its second half, from so long on."""
MORE, MORE_MIB, MORE_HANDLES = 0.05, 12.0, 24


@dataclass(frozen=True)
class Holding:
    """Of one process: resident memory of its own in MiB, open files, and for how many seconds it has been in use: since it
    started, or since requests began, where that was later.

    Pages of Ray's object store, which every process maps that has read an object, are nobody's own: the store has a limit itself.
    """

    pid: int
    mib: float
    handles: int
    used_s: float


@dataclass(frozen=True)
class Growth:
    """Of one kind of process, between the others and its last one after the same time in use; of one that lived all along, in its
    second half."""

    kind: str
    before: Holding
    after: Holding

    @property
    def is_leak(self) -> bool:
        """More than what noise is: five per cent and some, or handles by the dozen."""
        if self.after.used_s - self.before.used_s > SAME_S and self.after.used_s < OLD_S:
            return False  # none was in use for as long, and it may still find out what it needs
        more_mib = self.after.mib - self.before.mib
        return (
            more_mib > max(MORE_MIB, self.before.mib * MORE) or self.after.handles > self.before.handles + MORE_HANDLES
        )


class Watch:
    """Looks at the processes now and then.

    Args:
        cycle_s: in which each fault comes once. What a process holds is what the largest of them has left it: it is compared with
            what another held until so much later.
    """

    def __init__(self, cycle_s: float = 0.0) -> None:
        self._cycle_s = cycle_s
        self._seen: dict[str, dict[int, list[Holding]]] = defaultdict(lambda: defaultdict(list))
        self._began_s = _up_s()

    def look(self, pids: Iterable[int]) -> None:
        in_use_s = _up_s() - self._began_s  # before, it held what a new one holds
        for kind, found in holdings(pids).items():
            for holding in found:
                used = replace(holding, used_s=min(holding.used_s, in_use_s))
                self._seen[kind][holding.pid].append(used)

    def started(self, before: Mapping[str, list[Holding]]) -> Mapping[str, int]:
        """Of each kind of ours, how many processes were seen that were not there before: those killed have been replaced, and
        more than that are false alarms."""
        return {
            kind: len(set(processes) - {holding.pid for holding in before.get(kind, [])})
            for kind, processes in self._seen.items()
            if kind != RAY
        }

    def growths(self) -> list[Growth]:
        """Of each kind of ours, as far as any process lived long enough to tell."""
        found = []
        for kind, processes in self._seen.items():
            lives = [looks for looks in processes.values() if looks[-1].used_s >= SETTLED_S]
            if kind not in OURS or not lives:
                continue
            last = lives[-1]  # in the order they were first seen
            after = last[-1]
            others = [look for looks in lives if looks is not last for look in looks if look.used_s >= SETTLED_S]
            settled = [look for look in last if look.used_s >= SETTLED_S]
            half = (settled[0].used_s + after.used_s) / 2  # in its first half it may still find out what it needs
            before = min(others or settled, key=lambda look: abs(look.used_s - (after.used_s if others else half)))
            meanwhile = [look for look in others if 0 <= look.used_s - before.used_s <= self._cycle_s]
            found.append(Growth(kind, max(meanwhile, key=lambda look: look.mib, default=before), after))
        return found


def holdings(pids: Iterable[int]) -> Mapping[str, list[Holding]]:
    """By kind; `Ray` is whatever is not ours, and not HAProxy."""
    found: dict[str, list[Holding]] = defaultdict(list)
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            kind = next((name for name, pattern in (OURS | THEIRS).items() if pattern.search(command)), RAY)
            found[kind].append(_holding(pid))
    return found


def _holding(pid: int) -> Holding:
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / 100
    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Holding(pid, (resident - shared) * 4096 / 2**20, handles, _up_s() - started)


def _up_s() -> float:
    """Since the machine started."""
    return float(Path("/proc/uptime").read_text().split()[0])
