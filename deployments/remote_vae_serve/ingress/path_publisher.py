"""`PathPublisher`: tells Serve's fallback proxy which paths are models' own; see `published_paths`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from remote_vae_serve.published_paths import VALID_S, publish

logger = logging.getLogger("ray.serve")


class PathPublisher:
    """The paths of the models that one ingress serves, told anew when they change, and before they are forgotten.

    Args:
        application: that of the ingress. One that is not at `/` tells nothing: it is not asked there.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._told: Mapping[str, str] = {}
        self._told_at = 0.0

    def tell(self, applications: Mapping[str, Any], models: Iterable[str]) -> None:
        """Of Serve's applications, as its details have them, these models' paths."""
        if applications.get(self._application, {}).get("route_prefix") != "/":
            return
        paths = {str(path): name for name in models if (path := applications[name].get("route_prefix"))}
        if paths == self._told and (not paths or time.monotonic() < self._told_at + VALID_S / 3):
            return
        try:
            publish(paths)
        except Exception:  # the control plane restarts: at the next reading
            logger.warning("the models' paths could not be published", exc_info=True)
            return
        self._told, self._told_at = paths, time.monotonic()
