"""Whether this host's processor computes faster in bfloat16 than in float32: measured once, with a convolution as decoders have
them, and kept in a file of the user's cache folder.

That a processor has instructions for bfloat16 does not tell: AMX multiplies eight times as fast as float32, AVX-512 BF16 on many
no faster, and without any torch converts back and forth. Where oneDNN is told to leave AMX alone (`ONEDNN_MAX_CPU_ISA`), that is
measured too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger("ray.serve")

MARGIN = 1.5
"""Times as fast as float32 that bfloat16 has to be: below, it would cost digits and save next to no time."""
INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16"}
"""What Linux calls those that multiply bfloat16: of x86, and of ARM."""
OF_THE_ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""What changes which instructions torch uses."""
CPUINFO = Path("/proc/cpuinfo")
CHANNELS, EDGE = 128, 48
"""Of the convolution that is timed, 3x3: of those in decoders a small one, for the sake of slow processors."""
ROUNDS, BUDGET_S = 20, 0.5
"""So many of each, or fewer if all of it takes longer than that."""
MOST_BYTES = 4096
"""Of a kept file; more is none of ours."""


@functools.cache
def is_bfloat16_faster() -> bool:
    """Whether convolutions in bfloat16 are at least `MARGIN` times as fast as in float32 here. Takes a second at most, once a
    host."""
    return speed_of(CPUINFO, _cache_folder()) >= MARGIN


def speed_of(cpuinfo: Path, folder: Path | None, measure: Callable[[], float] | None = None) -> float:
    """How many times as fast bfloat16 is: kept, else measured and kept; 1 without measuring where no instruction multiplies it.

    Args:
        cpuinfo: Linux's description of the processors.
        folder: where it is kept; None keeps nothing. What lies there and is no such file is measured anew, and one that cannot be
            written is done without.
        measure: times both.
    """
    processor = _processor(cpuinfo)
    if not INSTRUCTIONS & set(processor.split()):
        return 1.0
    settings = [f"{name}={os.environ.get(name, '')}" for name in OF_THE_ENVIRONMENT]
    key = hashlib.sha256("\n".join([processor, torch.__version__, *settings]).encode()).hexdigest()
    path = None if folder is None else folder / f"bfloat16-{key[:16]}.json"
    if path is not None and (kept := _read(path, key)) is not None:
        return kept
    speed = (measure or _measure)()
    logger.info("A convolution in bfloat16 takes 1/%.1f of its time in float32 on this processor", speed)
    if path is not None:
        _write(path, key, speed)
    return speed


def _processor(cpuinfo: Path) -> str:
    """Name and instructions of the first processor; nothing where they are not told, as on other systems than Linux."""
    try:
        lines = cpuinfo.read_text(errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return ""
    told = dict(line.partition(":")[::2] for line in lines)
    named = {name.strip(): value.strip() for name, value in told.items()}
    return "\n".join(named.get(name, "") for name in ("model name", "CPU part", "flags", "Features"))


def _cache_folder() -> Path | None:
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):  # without a home the second is not
            return Path(folder) / "remote-vae"
    return None


def _read(path: Path, key: str) -> float | None:
    """The number in the file, if it is one of ours for that key."""
    try:
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:  # a pipe would wait
            kept = json.loads(file.read(MOST_BYTES))
        speed = kept["speed"] if kept["key"] == key else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return speed if isinstance(speed, float) and math.isfinite(speed) and speed > 0 else None


def _write(path: Path, key: str, speed: float) -> None:
    """All of the file or nothing, whoever else writes it at the time."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w") as file:
            json.dump({"key": key, "speed": speed, "torch": torch.__version__}, file)
        os.replace(temporary, path)
    except OSError as error:
        logger.info("How fast bfloat16 is here is measured at each start, for it cannot be kept: %s", error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@torch.inference_mode()
def _measure() -> float:
    """The shortest time of each, taken in turns and on one thread: other work on the host disturbs both, and several threads
    wait for the one that it disturbs."""
    steps = [_convolution(dtype) for dtype in (torch.float32, torch.bfloat16)]
    times = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        until = time.perf_counter() + BUDGET_S
        for step in steps:  # the first makes the kernel
            step()
        for _ in range(ROUNDS):
            for number, step in enumerate(steps):
                started = time.perf_counter()
                step()
                times[number] = min(times[number], time.perf_counter() - started)
            if time.perf_counter() > until:
                break
    finally:
        torch.set_num_threads(threads)
    return times[0] / times[1]


def _convolution(dtype: torch.dtype) -> Callable[[], object]:
    with torch.device("cpu"):
        weight = torch.full((CHANNELS, CHANNELS, 3, 3), 0.01, dtype=dtype).to(memory_format=torch.channels_last)
        given = torch.full((1, CHANNELS, EDGE, EDGE), 0.5, dtype=dtype).to(memory_format=torch.channels_last)
    return functools.partial(torch.nn.functional.conv2d, given, weight, padding=1)
