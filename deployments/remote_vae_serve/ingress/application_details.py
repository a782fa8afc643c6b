"""Application details: what Serve says of an application, plain values as `GET /api/serve/applications/` has them: which of its
replicas run, how many requests it takes, why it could not be deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from remote_vae.errors import BrokenReply
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.config import ASIDE, INGRESS_DEPLOYMENT


def places(config: Mapping[str, Any], replicas: int, ingresses: int) -> int | None:
    """Of a deployment, for one of so many ingresses: its part of what the replicas hold, or Serve's queue before the first.

    Were each ingress to fill all of it, what it let in would wait in Serve's router for a place, and be refused late.
    """
    queue, ongoing = config.get("max_queued_requests", -1), config["max_ongoing_requests"]
    if replicas and ongoing > ASIDE:
        return max(1, int(replicas * (ongoing - ASIDE)) // ingresses)
    return None if queue < 0 else int(replicas * ongoing) // ingresses + queue


def ingresses(applications: Mapping[str, Any]) -> int:
    """How many ingresses of whatever application share the models; at least this one."""
    deployments = (application["deployments"].get(INGRESS_DEPLOYMENT) for application in applications.values())
    return max(1, sum(len(running(deployment)) for deployment in deployments if deployment))


def is_coming(deployment: Mapping[str, Any]) -> bool:
    """Whether a replica is being started, or will be; one that is on its way out is none."""
    states = [str(one["state"]) for one in deployment["replicas"]]
    return deployment["target_num_replicas"] > 0 or any(not state.endswith("STOPPING") for state in states)


def running(deployment: Mapping[str, Any]) -> frozenset[str]:
    replicas = deployment["replicas"]
    return frozenset(one["replica_id"] for one in replicas if str(one["state"]).endswith("RUNNING"))


def described_by(args: Mapping[str, Any]) -> ModelDescription:
    """What serve_config.yaml says of a model that its builder has refused, or has not seen yet."""
    said = ModelDescription()
    for argument, value in args.items():
        if isinstance(value, (str, int, float)):
            # One of the wrong type is what the builder refused; the reason that Serve gives names it.
            with contextlib.suppress(BrokenReply):
                said = ModelDescription.from_plain({argument: value}).or_else(said)
    return said


def sentence(message: str) -> str:
    """What a person wants of Serve's message on a failed application: not the traceback, but what the last error said.

    A pydantic error takes several lines: a header, then for each mistake the argument, the complaint, a link.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip() and "For further information" not in line]
    header = next((number for number, line in enumerate(lines) if "validation error" in line), len(lines) - 2)
    said = [line.partition(" [type=")[0].removeprefix("Value error, ") for line in lines[header + 1 :]]
    return " ".join(said)[:500] or "Serve could not deploy it; see its status"
