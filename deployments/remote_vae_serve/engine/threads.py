"""`ThreadCount`: how many OpenMP threads torch's operations on a CPU run in, its cores shared by the replicas of a host.

Ray sets OMP_NUM_THREADS=1 in a replica that reserves less than one CPU: a decode would crawl. Every core for each replica is no
better: an operation waits for the slowest of its threads, and one whose core another replica has is slow.
"""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remote_vae_serve.config import VAEConfig

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Of torch's OpenMP, libgomp, which reads it when a process starts: a thread that waits for others sleeps. Else it spins for 3 ms
on a core that another replica, a codec or the event loop could have. What that costs: python -m benchmarks.threads."""
LOCK_FILE = Path(tempfile.gettempdir()) / f"remote-vae-cpus-{os.getuid()}"
"""Empty; the replicas of this user that are at work on this host hold locks on bytes of it. The kernel takes back those of a
process that is killed."""
CGROUPS, CGROUP_FOLDER = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class ThreadCount:
    """How many threads an operation gets: as `threads` or `num_cpus` say; else of the CPUs that this process may use, an equal
    share with the other replicas that are at work when it begins. One that is idle keeps no core from anybody.

    Args:
        config: the model's arguments.
        lock_file: by which replicas know of each other.

    Attributes:
        most: what an operation gets that has the host to itself, 1 or more.
    """

    def __init__(self, config: VAEConfig, lock_file: Path = LOCK_FILE) -> None:
        self._told = config.threads or int(config.num_cpus)
        self.most = self._told or usable_cpus()
        self._lock_file = lock_file

    @contextmanager
    def shared(self) -> Iterator[int]:
        """Set torch's threads for one operation, on the thread that runs it: OpenMP keeps the number for each thread."""
        import torch  # not above: Serve's controller, which places replicas, reads ENVIRONMENT

        with _opened(self._lock_file) as locks:
            at_work = _at_work(locks, usable_cpus())
            threads = self._told or max(1, self.most // at_work)
            torch.set_num_threads(threads)
            yield threads


@contextmanager
def _opened(lock_file: Path) -> Iterator[int | None]:
    """A descriptor of the file, with which all locks go; None where it cannot be opened, or is somebody else's."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _at_work(locks: int | None, cpus: int) -> int:
    """Lock one free byte for this process; how many have one, this one included, of so many at most as there are CPUs. Locks are
    POSIX's, which go with the process: those of flock would stay with what it has forked."""
    if locks is None:
        return 1
    has_own, others = False, 0
    for byte in range(cpus):
        try:
            fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX leaves it to the system which
            others += 1
            continue
        except OSError:  # a file system without locks
            return 1
        if has_own:
            fcntl.lockf(locks, fcntl.LOCK_UN, 1, byte)
        has_own = True
    return others + 1


def usable_cpus(cgroups: Path = CGROUPS, folder: Path = CGROUP_FOLDER) -> int:
    """CPUs that this process may keep busy, 1 or more: of its affinity, no more than the quota of the container.

    A quota is rounded to the nearest: who uses it up is stopped for the rest of each tenth of a second, and its event loop as
    well. Below 1.5 CPUs a second thread would gain little and stop it for up to half of the time; above, for a quarter at most.

    Args:
        cgroups: names the control groups of this process, as /proc/self/cgroup.
        folder: where they are mounted.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.floor(min(cpus, _cpu_quota(cgroups, folder)) + 0.5)))


def _cpu_quota(cgroups: Path, folder: Path) -> float:
    """CPUs that the control groups of this process and those above may use on average; infinite where none is limited, or it
    cannot be read. Inside of a container the path is often that of the host, and the container's own group is the folder."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, _, of = line.partition(":")
        controllers, _, path = of.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = folder / "cpu" if controllers else folder  # version 1 has a tree for each controller
        group = mounted / path.lstrip("/")
        quotas += [_quota_of(one) for one in (group, *group.parents) if one == mounted or mounted in one.parents]
    return min(quotas)


def _quota_of(group: Path) -> float:
    with suppress(OSError, ValueError, ArithmeticError):  # of version 2: "150000 100000", or "max 100000"
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError, ArithmeticError):  # of version 1: -1 is no limit
        each_period = int((group / "cpu.cfs_quota_us").read_text())
        return each_period / int((group / "cpu.cfs_period_us").read_text()) if each_period > 0 else math.inf
    return math.inf
