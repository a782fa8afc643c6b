"""`remote-vae-haproxy`: what Serve starts as its HAProxy. Edits the configuration that Serve has written, then becomes HAProxy.

Serve names no place for lines of one's own, but lets one name the binary. It becomes HAProxy by exec: pid and signals are
those that Serve knows. Imports little, since Serve starts HAProxy anew whenever a replica comes or goes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from remote_vae.ray_internals import HAPROXY_BINARY_VARIABLE, haproxy_binary
from remote_vae_serve.allowed_origins import read_origins
from remote_vae_serve.haproxy.config import LOOPBACK, edited
from remote_vae_serve.middleware.settings import ALLOW_ORIGINS, TOKENS

NAME = "remote-vae-haproxy"
BINARY = "REMOTE_VAE_HAPROXY_BINARY"
"""Environment variable of ours: the HAProxy to become; as Serve finds one where it is not set."""
METRICS_HOST = "REMOTE_VAE_HAPROXY_METRICS_HOST"
"""Environment variable of ours: the address on which HAProxy tells its metrics; loopback where it is not set."""


def variables(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Environment in which Serve starts HAProxy by way of this program; None where it is not installed beside the interpreter.

    Serve does not start at all with a path where no program is.
    """
    script = Path(sys.executable).with_name(NAME)
    if not os.access(script, os.X_OK):
        return None
    chosen = environment.get(HAPROXY_BINARY_VARIABLE, "")
    passed_on = {BINARY: chosen} if chosen and Path(chosen).name != NAME else {}
    return {HAPROXY_BINARY_VARIABLE: str(script), **passed_on}


def main() -> NoReturn:
    """Become HAProxy, with the arguments of this program."""
    os.environ.pop(HAPROXY_BINARY_VARIABLE, None)  # this program, and not HAProxy
    binary = os.environ.get(BINARY) or haproxy_binary()
    arguments = _with_our_config(sys.argv[1:], binary)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and who is started by exec would too
        signal.signal(number, signal.SIG_DFL)
    os.execv(binary, [binary, *arguments])


def _with_our_config(arguments: list[str], binary: str) -> list[str]:
    """The arguments with a file of ours instead of Serve's; as they are where that cannot be, for HAProxy is to start.

    Serve's file stays among them, as `-L` (a name that only peers of HAProxy would use): Serve knows its HAProxies by it when it
    tells those that it has replaced to stop.
    """
    if "-f" not in arguments[:-1]:
        return arguments
    at = arguments.index("-f") + 1
    serves = Path(arguments[at])
    ours = serves.with_name(f"{serves.stem}.remote-vae{serves.suffix}")
    left_out: list[str] = []
    try:
        text = edited(
            serves.read_text(),
            metrics_host=_metrics_host(),
            has_tokens=TOKENS in os.environ,
            allow_origins=_allow_origins(),
            left_out=left_out.append,
        )
        _write(ours, text)
    except (OSError, UnicodeError) as error:
        _say(f"{serves} stays as Serve has written it: {error}")
        return arguments
    if left_out:
        _say(f"Serve writes HAProxy's configuration otherwise than is known here; left out: {', '.join(left_out)}")
    if os.spawnv(os.P_WAIT, binary, [binary, "-c", "-q", "-f", str(ours)]) != 0:  # HAProxy has said why
        _say(f"{serves} stays as Serve has written it: HAProxy does not take {ours}")
        return arguments
    return [*arguments[:at], str(ours), *arguments[at + 1 :], "-L", str(serves)]


def _metrics_host() -> str:
    host = os.environ.get(METRICS_HOST, LOOPBACK)
    if re.fullmatch(r"[\w.:*\[\]-]+", host) is None:
        _say(f"{METRICS_HOST} is {host!r}; expected an address, and takes {LOOPBACK}")
        return LOOPBACK
    return host


def _allow_origins() -> tuple[str, ...]:
    try:
        return read_origins(filter(None, os.environ.get(ALLOW_ORIGINS, "").split(",")))
    except ValueError as error:  # the middleware says so too, and does not start
        _say(f"{ALLOW_ORIGINS}: {error}")
        return ()


def _write(path: Path, text: str) -> None:
    """Into a file that its owner alone may read; whole, or not at all, since another HAProxy may be starting."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _say(sentence: str) -> None:
    print(f"{NAME}: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
