"""A Python of its own for what an earlier test would blur: high-water marks of memory, settings that are read at a start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

GIVE_UP_S = 300.0


def printed_by(script: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> str:
    """What the script prints; it can import what the tests can. Raises CalledProcessError if it fails."""
    paths = [path for path in sys.path if path]
    command = [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths!r}\n{script}", *arguments]
    run = subprocess.run(
        command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True, timeout=GIVE_UP_S
    )
    return run.stdout
