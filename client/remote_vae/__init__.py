"""Decode latents, and encode pictures, on a remote-vae server: `remote_decode` and `remote_encode`, or `RemoteVAE` and
`AsyncRemoteVAE` for more than one."""

from importlib import import_module
from typing import TYPE_CHECKING

from remote_vae import errors

if TYPE_CHECKING:
    from remote_vae.async_client import AsyncRemoteVAE
    from remote_vae.calls.decode_call import open_result
    from remote_vae.client import RemoteVAE, list_models, remote_decode, remote_encode
    from remote_vae.errors import RemoteVAEError
    from remote_vae.transports.waiting import Waiting
else:
    # Imported at the first use: numpy, Pillow and requests take a third of a second, and HAProxy, which is started anew for
    # every change of replicas by way of `remote_vae_serve.haproxy`, waits for the errors alone.
    _HOMES = {
        "AsyncRemoteVAE": "async_client",
        "RemoteVAE": "client",
        "RemoteVAEError": "errors",
        "Waiting": "transports.waiting",
        "list_models": "client",
        "open_result": "calls.decode_call",
        "remote_decode": "client",
        "remote_encode": "client",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found


__all__ = [
    "AsyncRemoteVAE",
    "RemoteVAE",
    "RemoteVAEError",
    "Waiting",
    "errors",
    "list_models",
    "open_result",
    "remote_decode",
    "remote_encode",
]
