"""Decode latents on a remote-vae server: `remote_decode`, or `RemoteVAE` and `AsyncRemoteVAE` for more than one."""

from remote_vae import errors
from remote_vae.calls import open_result
from remote_vae.client import AsyncRemoteVAE, RemoteVAE, remote_decode
from remote_vae.errors import RemoteVAEError

__all__ = ["AsyncRemoteVAE", "RemoteVAE", "RemoteVAEError", "errors", "open_result", "remote_decode"]
