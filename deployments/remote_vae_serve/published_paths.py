"""Published paths: which path is which model's own, as the ingress tells Serve's fallback proxy, through Ray's key-value store.

By the words of a path alone the proxy, another process, could not tell a model's from that of somebody else's application.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from remote_vae.ray_internals import key_value_store

BY_INGRESS = "/~"
"""What a path begins with that goes through the ingress, whatever has a path of its own; no model can be called so."""
VALID_S = 60.0
"""How long published paths count: those of an ingress that is no more send nobody to it for ever."""
KEY = b"remote-vae/model-paths"


def publish(paths: Mapping[str, str]) -> None:
    """Tell the fallback proxy the models' paths, path to model; what was told before counts no more."""
    _, put = key_value_store()
    put(KEY, json.dumps({"at": time.time(), "paths": dict(paths)}).encode(), overwrite=True)


def published() -> Mapping[str, str]:
    """The models by their paths, as the ingress last told them; none where that is long ago."""
    get, _ = key_value_store()
    told = json.loads(get(KEY) or b'{"at": 0, "paths": {}}')
    paths: Mapping[str, str] = told["paths"]
    return paths if time.time() - told["at"] < VALID_S else {}
