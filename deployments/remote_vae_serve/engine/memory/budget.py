"""`budget`: the bytes that a replica may use, of what its device has."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from remote_vae_serve.config import VAEConfig

GIB = 2**30
RESERVE, LEAST_RESERVE = 0.1, 2**29
"""Of the device, for what is nobody's tensor: the CUDA context, libraries, an allocator's leftovers. They are no smaller on a
small device; of a very small one half is left for work all the same."""
CGROUP = Path("/sys/fs/cgroup")
CONTROLLERS = (
    ("", ("max", "current", "stat"), "inactive_file"),
    ("memory", ("limit_in_bytes", "usage_in_bytes", "stat"), "total_inactive_file"),
)
"""Version 2 of control groups, and version 1, whose limit is a very large number where there is none: where the files are, what
they are called, and the line that says what is cached."""


def budget(config: VAEConfig, device: str) -> int:
    """Bytes that weights and work together may take on the device.

    `memory` of the configuration: up to 1 a share of what the device has, above 1 GiB; `auto` is all of it less a reserve (a
    tenth, at least 512 MiB, at most half), and for a replica that reserves a share of a GPU that share.
    """
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else host_memory()
    if config.memory != "auto":
        return int(config.memory * (total if config.memory <= 1 else GIB))
    share = config.num_gpus if device == "cuda" and config.num_gpus != "auto" and 0 < config.num_gpus < 1 else 1
    there = total * share
    return int(there - min(there / 2, max(there * RESERVE, LEAST_RESERVE)))


def host_memory() -> int:
    """Bytes of this machine's memory that are free to use; in a container, of its limit."""
    available = int(psutil.virtual_memory().available)
    for folder, names, files in CONTROLLERS:
        try:
            limit, used, parts = ((CGROUP / folder / f"memory.{name}").read_text() for name in names)
        except OSError:
            continue
        if limit.strip() == "max":
            return available
        # Files that were read count as used, the weights first of all, and make room where it is needed.
        cached = dict(line.split() for line in parts.splitlines()).get(files, "0")
        return max(0, min(available, int(limit) - int(used) + int(cached)))
    return available
