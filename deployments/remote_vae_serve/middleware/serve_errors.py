"""What Serve and HAProxy answer on their own account, as errors of the contract: one sentence each, whoever says it.

Imports no more than the errors: HAProxy is started by way of it (`remote_vae_serve.haproxy`), and waits.
"""

from __future__ import annotations

from remote_vae.errors import DeadlineExceeded, Overloaded, Unavailable, UnknownRoute

RETRY_S = 2.0
BROKE_OFF_RETRY_S = 1.0
"""There mostly is another that answers."""
PATH_LENGTH = 80
"""So much of a path is said back."""


def nothing_at(path: str) -> UnknownRoute:
    """No application is there: at the start, at the end, or for good."""
    return UnknownRoute(
        f"Nothing is served at '{path}': no such route, or the service is still being deployed", retry_after=RETRY_S
    )


def broke_off() -> Unavailable:
    """The process that should have answered is gone."""
    return Unavailable("The service broke off in the middle of the request; try again", retry_after=BROKE_OFF_RETRY_S)


def cannot_answer() -> Unavailable:
    """Nobody can be asked."""
    return Unavailable("The service cannot answer at the moment; try again", retry_after=RETRY_S)


def full() -> Overloaded:
    """Serve's queue is full."""
    return Overloaded("The server's queue is full; try again", retry_after=RETRY_S)


def timed_out() -> DeadlineExceeded:
    """Serve, or HAProxy, has waited as long as it may."""
    return DeadlineExceeded("No result within the server's request time-out")
