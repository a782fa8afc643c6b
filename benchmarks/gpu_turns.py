"""Two models that take turns at one GPU under steady load, and fifty clients at a model that sleeps; as a table.

    python -m benchmarks.gpu_turns [--minutes 5] [--out benchmarks/results/gpu-turns.md]

The GPU is not there, the engines wait; the models scale as those of serve_config.yaml do.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from local_server import CONFIG, free_port
from remote_vae import RemoteVAE, RemoteVAEError
from remote_vae.ray_internals import RECOVERY_VARIABLES
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig

MODELS = ("one", "another")
CLIENTS = 2
STORM = 50
DEADLINE_S = 60.0
DECODE_S = 0.2
SLEEPER = "sleeper"
Z = torch.zeros(1, 4, 8, 8)


def as_shipped() -> Mapping[str, Any]:
    """The autoscaling of the models in serve_config.yaml that start from zero."""
    applications = yaml.safe_load(CONFIG.read_text())["applications"]
    (options,) = next(app for app in applications if app["name"] == "sd-v1")["deployments"]
    return dict(options["autoscaling_config"])


def deploy(name: str, num_gpus: float) -> None:
    config = VAEConfig(source="nowhere", fake={"decode_s": DECODE_S}, device="cpu", num_gpus=num_gpus, num_cpus=0)
    application = vae(config)._bound_deployment.options(autoscaling_config=as_shipped()).bind(config)
    serve.run(application, name=name, route_prefix=None)


def ask(url: str, name: str, until: float, answered: list[float], lost: Counter[str]) -> None:
    with RemoteVAE(f"{url}/{name}", deadline=DEADLINE_S) as model:
        while time.monotonic() < until:
            try:
                model.decode(Z, output_type="pt")
                answered.append(time.monotonic())
            except RemoteVAEError as error:
                lost[error.code] += 1


def turns(url: str, seconds: float) -> list[str]:
    """Of each model the answers, and the longest time without one, from when its load begins to when that ends."""
    began, lines = time.monotonic(), []
    answered: dict[str, list[float]] = {name: [] for name in MODELS}
    lost: dict[str, Counter[str]] = {name: Counter() for name in MODELS}
    threads = [
        threading.Thread(target=ask, args=(url, name, began + seconds, answered[name], lost[name]))
        for name in MODELS
        for _ in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in MODELS:
        times = [began, *sorted(answered[name]), began + seconds]
        gap = max(after - before for before, after in pairwise(times))
        refused = f"{sum(lost[name].values())} {dict(lost[name]) or ''}"
        lines.append(f"| `{name}` | {len(answered[name])} | {refused} | {gap:.1f} s |")
    return lines


def storm(url: str) -> str:
    """What fifty clients at once get of a model without a replica."""

    def one(_: int) -> str:
        with RemoteVAE(f"{url}/{SLEEPER}", deadline=DEADLINE_S) as model:
            try:
                model.decode(Z, output_type="pt")
            except RemoteVAEError as error:
                return error.code
        return "answered"

    began = time.monotonic()
    with ThreadPoolExecutor(STORM) as pool:
        ended = Counter(pool.map(one, range(STORM)))
    return f"{STORM} clients at a model that sleeps: {dict(ended)}, the last after {time.monotonic() - began:.1f} s."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    os.environ |= RECOVERY_VARIABLES
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        url = f"http://127.0.0.1:{port}"
        serve.run(ingress(IngressConfig()), name="remote-vae", route_prefix="/")
        deploy(SLEEPER, num_gpus=0)
        stormed = storm(url)
        for name in MODELS:
            deploy(name, num_gpus=1)
        rows = turns(url, args.minutes * 60)
    finally:
        serve.shutdown()
        ray.shutdown()
    text = "\n".join([
        "# Turns at a GPU", "",
        f"{args.minutes:g} minutes, {CLIENTS} clients of each model with a deadline of {DEADLINE_S:g} s, decodes of "
        f"{DECODE_S:g} s, one GPU.", "",
        "| model | answered | lost | longest gap |", "|---|---:|---:|---:|", *rows, "", stormed,
    ]) + "\n"  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
