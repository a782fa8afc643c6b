"""Decode latents, and encode pictures, on a remote-vae server: `remote_decode` and `remote_encode`, or `RemoteVAE` and
`AsyncRemoteVAE` for more than one."""

from remote_vae import errors
from remote_vae.async_client import AsyncRemoteVAE
from remote_vae.calls.decode_call import open_result
from remote_vae.client import RemoteVAE, list_models, remote_decode, remote_encode
from remote_vae.errors import RemoteVAEError

__all__ = [
    "AsyncRemoteVAE",
    "RemoteVAE",
    "RemoteVAEError",
    "errors",
    "list_models",
    "open_result",
    "remote_decode",
    "remote_encode",
]
