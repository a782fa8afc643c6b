"""Who waits for what, and who holds it: read out of Serve's details. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from remote_vae_serve.scaling import TURN_S, YieldWhenIdle

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Shortage:
    """Why a model's first replica cannot be placed.

    Attributes:
        missing: resources it needs and the cluster has not free.
        holders: the applications whose replicas hold them.
        certain: those replicas alone account for it. Otherwise others of the cluster hold some, or it is just being given
            to this very replica, which Ray does not tell apart.
        turn_s: seconds after which each of those replicas gives it up to who waits, busy or not; infinity where one does not.
    """

    missing: Resources
    holders: tuple[str, ...]
    certain: bool = True
    turn_s: float = math.inf

    def __str__(self) -> str:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in self.missing.items())
        if not self.holders:
            return f"waits for {needs}; no node of the cluster has it free"
        verb = "holds" if len(self.holders) == 1 else "hold"
        others = "" if self.certain else ", and others outside of Serve may"
        return f"waits for {needs}; {', '.join(self.holders)} {verb} it{others}"


def shortages(applications: Mapping[str, Any], total: Resources, available: Resources) -> dict[str, Shortage]:
    """The applications whose first replica waits to be placed, and for what.

    Args:
        applications: Serve's details of them.
        total, available: what the cluster has, and has free.
    """
    held: dict[str, dict[str, float]] = {}
    for name, deployment, replica in _replicas(applications):
        if "node_id" in replica:  # placed: Serve learns the node when the actor's process is up
            for resource, amount in deployment["required_resources"].items():
                if amount > 0:
                    holding = held.setdefault(resource, {})
                    holding[name] = holding.get(name, 0.0) + amount
    waiting = {}
    for name, deployment, replica in _replicas(applications):
        siblings = deployment["replicas"]
        if "node_id" in replica or any("node_id" in sibling for sibling in siblings):
            continue
        missing, holders, certain = {}, set(), True
        for resource, amount in deployment["required_resources"].items():
            holding = held.get(resource, {})
            accounted = total.get(resource, 0) - sum(holding.values()) < amount - 1e-6
            if accounted or available.get(resource, 0) < amount - 1e-6:
                holders |= set(holding)
                missing[resource] = amount
                certain = certain and accounted
        if missing:
            configs = (
                one["deployment_config"] for holder in holders for one in applications[holder]["deployments"].values()
            )
            turn_s = max((_turn_s(config) for config in configs), default=math.inf)
            waiting[name] = Shortage(missing, tuple(sorted(holders)), certain, turn_s)
    return waiting


def _turn_s(config: Mapping[str, Any]) -> float:
    """Seconds after which a deployment gives up what it holds to another that waits for it; infinity where it does not."""
    scaling = config.get("autoscaling_config") or {}
    policy = scaling.get("policy") or {}
    if scaling.get("min_replicas") != 0 or not policy.get("policy_function", "").endswith(YieldWhenIdle.__name__):
        return math.inf
    turn_s = policy.get("policy_kwargs", {}).get("turn_s", TURN_S)
    return turn_s if isinstance(turn_s, (int, float)) else TURN_S  # as the policy reads it


def _replicas(applications: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    for name, application in applications.items():
        for deployment in application["deployments"].values():
            for replica in deployment["replicas"]:
                yield name, deployment, replica
