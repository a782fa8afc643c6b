"""Graceful shutdown: draining. Requests in flight finish before Serve and its proxies go, which cut whatever they carry."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from remote_vae.ray_internals import serve_details
from remote_vae_serve.ingress.application_details import running

INTERVAL_S = 0.1


def drain(limit_s: float) -> Collection[str]:
    """Delete every application, the doors first: Serve takes away its route, and lets a replica go that answers nothing any more.

    What comes meanwhile gets a 404 that says to try again. A model without a path of its own, or without a replica that answers
    there, is asked by way of the ingress, so that it goes when the doors have gone, and finishes what handles have sent it.

    Returns:
        The applications that had not gone after `limit_s` seconds; none where all requests have finished.
    """
    from ray import serve

    give_up = time.monotonic() + limit_s
    applications = serve_details()["applications"]
    doors = [name for name, application in applications.items() if _is_door(application)]
    for names in (doors, [name for name in applications if name not in doors]):
        for name in names:
            serve.delete(name, _blocking=False)
        while left := sorted(set(names) & set(serve.status().applications)):
            if time.monotonic() > give_up:
                return left
            time.sleep(INTERVAL_S)
    return ()


def _is_door(application: Mapping[str, Any]) -> bool:
    """Whether requests come by it: it has a path, and somebody who answers there."""
    deployments = application["deployments"].values()
    return application["route_prefix"] is not None and any(running(deployment) for deployment in deployments)
