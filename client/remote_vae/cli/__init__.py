"""`remote-vae`: the client on the command line. Begin at `commands`."""

from remote_vae.cli.commands import main

__all__ = ["main"]
