"""Nodes that are lost, fall silent, or are drained while requests go on: what our client and a plain one see; as a table.

    python -m benchmarks.nodes [--times 5] [--faults lost,silent,drained] [--haproxy] [--out benchmarks/results/nodes.md]

A Ray of several nodes on this machine, each with its own raylet and one GPU that is not there. The model has two replicas, each
on a node of its own, and there is one node to spare; the two ingresses are where Serve puts them, and the proxy is the head's.
The model is asked at the ingress and at a path of its own.

Exit code 1 where our client lost anything, or a plain one while a node was drained.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from benchmarks.soak.clients import DEADLINE_S, TRY_S, Clients, ours, plain
from benchmarks.soak.faults import Fault
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.report import outcomes_table, silences_table, what_went_wrong
from benchmarks.soak.works import DIRECT, FAKE, Work, works
from local_server import descendants, free_port
from remote_vae import RemoteVAE
from remote_vae.ray_internals import (
    DEATH_VARIABLES,
    FAST_VARIABLES,
    MIDDLEWARE_VARIABLE,
    RECOVERY_VARIABLES,
    SILENCE_VARIABLES,
    serve_details,
)
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig
from remote_vae_serve.haproxy import command as haproxy_command
from remote_vae_serve.proxy import IMPORT_PATH

NODES = 3
REPLICAS = 2
DRAIN_S = 30
SETTLED_S = 5.0
ENVIRONMENT = {
    **SILENCE_VARIABLES,
    **RECOVERY_VARIABLES,
    **DEATH_VARIABLES,
    MIDDLEWARE_VARIABLE: IMPORT_PATH,
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_enable_worker_prestart": "0",
}
"""As `cluster/` has it; and beside so many nodes on one machine a proxy may take longer to start."""


class Nodes:
    """The cluster, with always as many nodes that can hold a replica."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False}
        )
        self._spare = [self._add() for _ in range(NODES)]
        ray.init(self._cluster.address, namespace="nodes", log_to_driver=False)

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, num_gpus=1, wait=True)

    def of_a_replica(self) -> Any:
        """A node that holds one."""
        held = {replica.get("node_id") for replica in _replicas() if replica["state"] == "RUNNING"}
        return next(node for node in self._spare if node.node_id in held)

    def replace(self, node: Any) -> None:
        """Another one for a node that has gone."""
        self._spare.remove(node)
        self._spare.append(self._add())

    def lose(self) -> None:
        node = self.of_a_replica()
        self._cluster.remove_node(node, allow_graceful=False)
        self.replace(node)

    def silence(self) -> None:
        """Every process of it stops where it is; its connections stay open."""
        node = self.of_a_replica()
        pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
        stopped = {pid for one in pids for pid in (one, *descendants(one))}
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: not any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes()), 120)
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        self.replace(node)

    def drain(self) -> None:
        """As an autoscaler does before it takes a node away."""
        node = self.of_a_replica()
        address = canonicalize_bootstrap_address_or_die(self._cluster.address)
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
                "--deadline-remaining-seconds", str(DRAIN_S),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        self._spare.append(self._add())
        self._spare.remove(node)
        wait_until(lambda: node.node_id not in {replica.get("node_id") for replica in _replicas()}, 120)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def _replicas() -> list[Mapping[str, Any]]:
    return list(serve_details()["applications"][FAKE]["deployments"]["VAE"]["replicas"])


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError
        time.sleep(0.1)


def ready() -> bool:
    return sum(replica["state"] == "RUNNING" for replica in _replicas()) == REPLICAS


def measure(nodes: Nodes, url: str, name: str, times: int, todo: list[Work]) -> tuple[list[str], bool]:
    """The table of one fault, and whether nobody lost what nobody may lose."""
    fault = {"lost": nodes.lose, "silent": nodes.silence, "drained": nodes.drain}[name]
    vaes = {door: RemoteVAE(f"{url}/{door}", deadline=DEADLINE_S, timeout=(5.0, TRY_S)) for door in (FAKE, DIRECT)}
    answers: list[Answer] = []
    happened: list[Fault] = []
    clients = []
    for door in vaes:
        there = [work for work in todo if work.model == door]
        clients += [
            Clients("ours", [lambda work: ours(vaes[work.model], work)] * 2, there, answers.append),
            Clients("plain", [partial(plain, url)] * 2, there, answers.append),
        ]
    for _ in range(times):
        time.sleep(SETTLED_S)
        at = time.time()
        fault()
        happened.append(Fault(name, at, True))
        wait_until(ready, 180)
        print(f"{name}: both replicas run {time.time() - at:.0f} s later", file=sys.stderr, flush=True)
    time.sleep(SETTLED_S)
    hung = sum(group.stop() for group in clients)
    lines = [*outcomes_table(answers), "", *silences_table(answers, happened), "", *what_went_wrong(answers)]
    is_lost = hung > 0 or any(
        answer.outcome is not Outcome.RIGHT and (answer.client == "ours" or name == "drained") for answer in answers
    )
    return [
        f"## {name}, {times} times",
        "",
        *lines,
        *([f"- {hung} clients never came to an end"] if hung else []),
        "",
    ], not is_lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--faults", default="lost,silent,drained")
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT | (FAST_VARIABLES | (haproxy_command.variables(os.environ) or {}) if args.haproxy else {})
    todo = [work for work in works() if work.model in (FAKE, DIRECT)]
    port = free_port()
    nodes = Nodes()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        both = ingress(IngressConfig())._bound_deployment.options(num_replicas=REPLICAS).bind(IngressConfig())
        serve.run(both, name="remote-vae", route_prefix="/")
        config = VAEConfig(source="nowhere", fake={"decode_s": 0.05}, device="cpu", num_gpus=1, num_cpus=0)
        application = vae(config)._bound_deployment.options(num_replicas=REPLICAS).bind(config)
        serve.run(application, name=FAKE, route_prefix=f"/{DIRECT}")
        measured = [
            measure(nodes, f"http://127.0.0.1:{port}", name, args.times, todo) for name in args.faults.split(",")
        ]
    except BaseException:
        traceback.print_exc()  # a Ray of which the driver lost its node ends the process in what follows
        raise
    finally:
        nodes.close()
    lines = [line for table, _ in measured for line in table]
    text = "\n".join([f"# Nodes, {'HAProxy' if args.haproxy else 'Python proxy'}", "", *lines]) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return int(not all(is_right for _, is_right in measured))


if __name__ == "__main__":
    sys.exit(main())
