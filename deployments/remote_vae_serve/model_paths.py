"""Paths of the models' own, `/<model>`, under HAProxy: while a model has a replica, that answers there itself; while it has none,
HAProxy asks Serve's fallback proxy, which sends the request on to the ingress.

This is what `remote-vae-serve run` and `deploy` do to a serve_config.yaml, and cluster/generate.py, which loads this file where
nothing of ours is installed: no imports here but Python's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VAE = "remote_vae_serve.app:vae"
INGRESS = "remote_vae_serve.app:ingress"
LIMITS = ("max_body_mib", "max_bodies_mib", "request_timeout_s", "deadline_s", "trusted_proxies", "allow_origins")
"""Arguments of the ingress that hold at a model's own path as well, where the model has none of its own."""
TIME_OUTS = {"request_timeout_s", "deadline_s"}
"""One argument, and its former name."""


def with_model_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Serve configuration in which every model that the ingress at `/` serves has a path of its own, `/<name>`.

    A model with a `route_prefix` keeps it; one whose path another application has gets none, and stays behind the ingress.
    Without an ingress at `/` nothing is changed.
    """
    applications = config["applications"]
    ingress = next((app for app in applications if app["import_path"] == INGRESS and _path(app) == "/"), None)
    if ingress is None:
        return dict(config)
    given = ingress.get("args") or {}
    served = given.get("models")
    limits = {name: given[name] for name in LIMITS if name in given}
    taken = {_path(app) for app in applications}
    return dict(config) | {
        "applications": [
            _with_path(app, limits)
            if (served is None or app["name"] in served) and f"/{app['name']}" not in taken
            else app
            for app in applications
        ]
    }


def _with_path(application: dict[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    if application["import_path"] != VAE or _path(application) is not None:
        return application
    own = application.get("args") or {}
    said = own.keys() | (TIME_OUTS if own.keys() & TIME_OUTS else set())
    more = {name: value for name, value in limits.items() if name not in said}
    return application | {"route_prefix": f"/{application['name']}", "args": {**own, **more}}


def _path(application: Mapping[str, Any]) -> str | None:
    path: str | None = application.get("route_prefix", "/")  # Serve's own default
    return path
