"""Deploy a configuration to a server that runs: what `remote-vae-serve deploy` starts.

`python -m remote_vae_serve.launcher.deployment DASHBOARD CONFIG`
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from remote_vae.ray_internals import RunningServe
from remote_vae_serve.model_paths import with_model_paths


def main(dashboard: str, path: str) -> None:
    """Have the server be what the configuration says; under HAProxy each model keeps, or gets, a path of its own.

    Args:
        dashboard: URL of its Ray's dashboard.
        path: a serve_config.yaml.

    Exits with 1, and a sentence, where nobody answers there, or refuses.
    """
    config = yaml.safe_load(Path(path).read_text())
    try:
        serve = RunningServe(dashboard)
        under_haproxy = serve.is_under_haproxy()
        serve.deploy(with_model_paths(config) if under_haproxy else config)
    except Exception as error:
        sys.exit(f"{dashboard} does not take the configuration: {' '.join(str(error).split())[:600]}")
    where = " at a path of its own, /<model>" if under_haproxy else " by way of the ingress"
    print(f"Deployed {path}; each model answers{where}. GET /models says how it goes on.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
