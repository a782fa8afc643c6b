"""How long a cold start takes and what the time is made of, and how replicas follow a load: on this machine, as a table.

    python benchmarks/scaling.py [--starts 3] [--out benchmarks/results/scaling.md]

The model is of Stable Diffusion's full size (84 million parameters, 335 MB), with random weights: loading does not depend
on them. Serve's numbers are those of serve_config.yaml, except `max_replicas` and `idle_s` where the text says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import requests
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from local_server import LocalServer

QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32"}
BODY = torch.randn(1, 4, 8, 8).numpy().tobytes()
STEPS = ("process", "imports", "weights", "first decode", "whole")


def full_size_vae(folder: Path) -> Path:
    """The architecture of stabilityai/sd-vae-ft-mse with random weights."""
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def decode(server: LocalServer, model: str) -> requests.Response:
    answer = requests.post(f"{server.url}/{model}", params=QUERY, data=BODY, timeout=300)
    answer.raise_for_status()
    return answer


def state(server: LocalServer, model: str) -> dict[str, Any]:
    return dict(requests.get(f"{server.url}/{model}", timeout=10).json())


def wait_until_cold(server: LocalServer, model: str) -> None:
    while state(server, model)["state"] != "cold":
        time.sleep(0.2)


def cold_start(server: LocalServer, model: str) -> dict[str, float]:
    """Seconds of each step, from a request to a model without replicas to its answer."""
    wait_until_cold(server, model)
    asked = time.time()
    decode(server, model)
    answered = time.time()
    while "startup" not in (description := state(server, model)):
        time.sleep(0.1)
    startup = description["startup"]
    steps = {"process": startup["began"] - asked, "imports": startup["imports_s"], "weights": startup["weights_s"]}
    return steps | {"first decode": answered - asked - sum(steps.values()), "whole": answered - asked}


def follow_a_load(server: LocalServer, model: str, clients: int, seconds: float) -> list[tuple[float, str]]:
    """When what happened, in seconds from the first request, until the last replica is gone."""
    wait_until_cold(server, model)
    events, stop, answered, started = [], threading.Event(), [0], time.monotonic()

    def load() -> None:
        while not stop.is_set():
            decode(server, model)
            answered[0] += 1

    threads = [threading.Thread(target=load) for _ in range(clients)]
    for thread in threads:
        thread.start()
    events.append((0.0, f"{clients} clients begin to ask"))
    count = 0
    while True:
        now = time.monotonic() - started
        if now > seconds and not stop.is_set():
            stop.set()
            events.append((now, f"they stop, after {answered[0]} answers"))
        replicas = server_replicas(model)
        if replicas != count:
            events.append((time.monotonic() - started, f"{replicas} replica{'s' if replicas != 1 else ''}"))
            count = replicas
        if stop.is_set() and count == 0:
            break
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    return events


def server_replicas(model: str) -> int:
    from ray import serve

    return int(serve.status().applications[model].deployments["VAE"].replica_states.get("RUNNING", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = full_size_vae(Path(folder) / "vae")

        def change(config: dict[str, Any]) -> None:
            ingress, _, sd = config["applications"][:3]
            sd["args"] = {"source": str(weights), "device": "cpu", "num_gpus": 0}
            scaling = sd["deployments"][0]["autoscaling_config"]
            quick = scaling | {"policy": scaling["policy"] | {"policy_kwargs": {"idle_s": 5}}}
            sd["deployments"][0]["autoscaling_config"] = quick
            elastic = {
                "name": "elastic", "route_prefix": None, "import_path": sd["import_path"],
                "args": {"source": "x", "device": "cpu", "num_gpus": 0, "fake": {"decode_s": 0.5}},
                "deployments": [{"name": "VAE", "autoscaling_config": quick | {"max_replicas": 3}}],
            }  # fmt: skip
            config["applications"] = [ingress, sd, elastic]

        server = LocalServer(models=(), change=change)
        with server:
            os.environ.update(server.ray_environment)  # before Ray is imported, which reads it then
            import ray

            ray.init(address=server.ray_address, log_to_driver=False, logging_level="ERROR")
            while {model["name"] for model in requests.get(f"{server.url}/models").json()["models"]} != {
                "sd-v1",
                "elastic",
            }:
                time.sleep(0.2)
            starts = [cold_start(server, "sd-v1") for _ in range(args.starts)]
            events = follow_a_load(server, "elastic", clients=8, seconds=40)
            ray.shutdown()
    report = render(starts, events)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)


def render(starts: list[dict[str, float]], events: list[tuple[float, str]]) -> str:
    import ray

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    rows = [
        f"| {step} | {statistics.median(s[step] for s in starts):.2f} | "
        f"{min(s[step] for s in starts):.2f} to {max(s[step] for s in starts):.2f} |"
        for step in STEPS
    ]
    lines = [f"| {at:5.1f} | {what} |" for at, what in events]
    return "\n".join([
        "# Cold start and scaling",
        "",
        f"`python benchmarks/scaling.py` at {commit}, {os_cores()} cores ({platform.machine()}), no GPU, Ray {ray.__version__}, "
        f"torch {torch.__version__}.",
        "",
        "## A cold start, step by step",
        "",
        "A request to a model with no replica, full-size Stable Diffusion VAE on the CPU, weights in the page cache; "
        f"{len(starts)} starts.",
        "",
        "| step | median, s | range |", "|---|---|---|", *rows,
        "",
        "`process`: the request reaches the ingress, Serve decides, Ray starts a worker. `imports`: torch and diffusers.",
        "",
        "## A load comes and goes",
        "",
        "A model that takes 0.5 s a decode, `target_ongoing_requests: 2`, `max_replicas: 3`, `idle_s: 5`.",
        "",
        "| s | |", "|---|---|", *lines, "",
    ])  # fmt: skip


def os_cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
