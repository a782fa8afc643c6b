"""Startup probe: whether every process that answers HTTP has our middleware (`proxy`) in front.

Serve is told of the middleware by an environment variable, and ignores one that it does not know: under a Ray that renamed it,
or on a node without it, everybody would be served. Serve's proxies are asked before there is an application; the replicas behind
HAProxy, which have HTTP only with one, as soon as they listen: until then `proxy.guarded` holds. With tokens set, one
process without the middleware stops the server.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from dataclasses import dataclass, field
from typing import NoReturn

from remote_vae.ray_internals import MIDDLEWARE_VARIABLE, HTTPTarget, http_targets
from remote_vae_serve.middleware.settings import TOKENS

PATH = "/-/routes"
"""Answered by Serve itself, never by an application: only what is in front of Serve can refuse it."""
ANNOUNCED = 2**62
"""Bytes of a body that nobody sends; SizeLimit refuses it by its length alone."""
WILDCARDS = ("0.0.0.0", "::", "")
PATIENCE_S = 30.0
FIRST_PROXY_S = 120.0
"""A proxy that is not ready in time Serve starts anew, so that the first takes long on a busy machine."""
ANSWER_S = 5.0


class MiddlewareMissing(Exception):
    """A process answers HTTP without our middleware, or nobody can tell whether it has it. The text is for the operator."""


@dataclass
class Probe:
    """Asks each process once.

    Attributes:
        host: what the processes listen on.
        tls: whether they speak TLS.
        has_tokens: whether a request without a token must be refused.
    """

    host: str
    tls: bool
    has_tokens: bool
    _passed: set[HTTPTarget] = field(default_factory=set)
    _silent_since: dict[HTTPTarget, float] = field(default_factory=dict)

    @property
    def has_answer(self) -> bool:
        """Whether anybody who answers HTTP now has passed."""
        return bool(self._passed)

    def ask(self) -> bool:
        """Ask whoever was not asked yet; whether all that are there have answered. Raises MiddlewareMissing."""
        found = set(http_targets())
        self._passed &= found
        self._silent_since = {target: since for target, since in self._silent_since.items() if target in found}
        for target in found - self._passed:
            host = target.host if self.host in WILDCARDS else self.host
            try:
                code = refusal(host, target.port, self.tls)
            except OSError as error:
                # A replica may be listed a moment before it listens, or after it is gone.
                since = self._silent_since.setdefault(target, time.monotonic())
                if time.monotonic() - since > PATIENCE_S:
                    raise MiddlewareMissing(
                        f"{target.name} at {host}:{target.port} cannot be asked: {error}"
                    ) from error
                continue
            if code != ("unauthorized" if self.has_tokens else "body_too_large"):
                raise MiddlewareMissing(
                    f"{target.name} at {host}:{target.port} answers without remote-vae's middleware"
                )
            self._passed.add(target)
            self._silent_since.pop(target, None)
            print(f"Tokens and size limit are in place: {target.name}, {host}:{target.port}", flush=True)
        return not self._silent_since


def refusal(host: str, port: int, tls: bool = False) -> str:
    """The error code of what is answered to a request without a token and with a body too large; "" for any other answer.

    Raises OSError where nobody answers.
    """
    connection = (
        http.client.HTTPSConnection(host, port, timeout=ANSWER_S, context=ssl._create_unverified_context())
        if tls
        else http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    )
    try:
        connection.putrequest("GET", PATH)
        connection.putheader("content-length", str(ANNOUNCED))
        connection.endheaders()
        return str(json.loads(connection.getresponse().read())["code"])
    except (http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""
    finally:
        connection.close()


def begin(probe: Probe) -> bool:
    """Ask the proxies, once there are any. Whether to go on asking."""
    give_up = time.monotonic() + FIRST_PROXY_S
    try:
        while not (probe.ask() and probe.has_answer):
            if time.monotonic() > give_up and not probe.has_answer:
                raise MiddlewareMissing(f"Nobody answers HTTP after {FIRST_PROXY_S:g} s")
            time.sleep(0.1)
    except MiddlewareMissing as error:
        _warn_or_raise(probe, error)
        return False
    except Exception as error:  # Ray changed, and no longer says who answers HTTP
        _warn_or_raise(probe, MiddlewareMissing(f"Who answers HTTP cannot be found out: {error!r}"))
        return False
    return True


def goes_on(probe: Probe) -> bool:
    """Ask those who came since. Whether to go on asking."""
    try:
        probe.ask()
    except MiddlewareMissing as error:
        _warn_or_raise(probe, error)
        return False
    except Exception:  # the controller restarts now and then, which is no reason to stop what serves
        return True
    return True


def _warn_or_raise(probe: Probe, error: MiddlewareMissing) -> None:
    if probe.has_tokens:
        raise error
    print(f"{error}: bodies over the limit are read before they are refused, and Serve's own errors are text. "
          f"{_advice()}", file=sys.stderr, flush=True)  # fmt: skip


def refuse(error: MiddlewareMissing) -> NoReturn:
    """End the process with the reason, exit code 1."""
    print(f"{error}, so {TOKENS} would not be enforced; nothing is served. {_advice()}", file=sys.stderr, flush=True)
    sys.exit(1)


def _advice() -> str:
    import ray

    return (
        f"Ray {ray.__version__} on each node must know {MIDDLEWARE_VARIABLE}, and have it and {TOKENS} in its environment: "
        "install the ray that remote-vae's pyproject.toml allows and restart the nodes, or check tokens in a proxy of your own "
        f"and unset {TOKENS}"
    )
