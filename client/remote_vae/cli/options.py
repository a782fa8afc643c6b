"""Options that commands of `remote-vae` share, and what is meant by them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from remote_vae.cli import files
from remote_vae.cli.files import FileError
from remote_vae.errors import BadRequest
from remote_vae.protocol.hints import PARAMETERS, Hints
from remote_vae.protocol.parameters import Parameter, collect
from remote_vae.protocol.wire import Scaling
from remote_vae.transports.http import HttpTransport
from remote_vae.transports.retry import DEFAULT_TIMEOUT, RETRIES, RetryPolicy
from remote_vae.transports.transport import IN_FLIGHT

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]
ENDPOINT, TOKEN = "REMOTE_VAE_ENDPOINT", "REMOTE_VAE_TOKEN"

_POSITIVE = click.FloatRange(min=0, min_open=True)
_PIXELS = click.IntRange(1, 2**20)
_URL = re.compile(r"https?://", re.IGNORECASE)
_ADDRESS = re.compile(r"[\w.-]+:\d+(/|$)")


def together(*options: Decorator[Any]) -> Decorator[Any]:
    """One decorator of several, which are listed by --help in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def connection(retries: int | None = None) -> Decorator[Any]:
    """Those of every command that asks a server; `transport` takes them."""
    return together(
        click.option("--token", envvar=TOKEN, show_envvar=True, help="Of the server, where it asks for one."),
        click.option("--timeout", type=_POSITIVE, help="Seconds for one try.  [default: 10 to connect, 300 to answer]"),
        click.option("--deadline", type=_POSITIVE, help="Seconds for all tries of one request.  [default: none]"),
        click.option("--retries", type=click.IntRange(min=0), default=retries,
                     help="Tries after the first, where the server is busy or away.  "
                     + (f"[default: {RETRIES}; with a deadline, until it]" if retries is None else f"[default: {retries}]")),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, errors included."),
    )  # fmt: skip


def inputs_and_outputs(kinds: Sequence[str], default: str) -> Decorator[Any]:
    """Those of the commands that make files of files."""
    return together(
        click.option("-o", "--output", metavar="PATH", help="A file; a folder (it exists, ends in a slash or has no "
                     "suffix); or - for standard output.  [default: beside each input]"),
        click.option("--format", "kind", type=click.Choice(kinds), help=f"[default: as -o ends; else {default}]"),
        click.option("--key", help="Name of the tensor, in inputs that hold several."),
        click.option("--force", is_flag=True, help="Overwrite files that are there."),
        click.option("--skip-existing", is_flag=True, help="Leave out inputs whose files are there: go on after a stop."),
        click.option("--concurrency", "--jobs", type=click.IntRange(1, 256), default=IN_FLIGHT, show_default=True,
                     help="Inputs at a time."),
    )  # fmt: skip


scaling_options = together(
    click.option("--scaling", type=click.Choice(("own", "none")), help="own: latents are those of the model's pipelines. "
                 "none: they are the decoder's own.  [default: own]"),
    click.option("--scaling-factor", type=float, help="This factor instead of the model's own."),
    click.option("--shift-factor", type=float, help="This shift instead of the model's own."),
)  # fmt: skip

size_options = together(
    click.option("--height", type=_PIXELS, help="Of the picture in pixels; for packed latents, as Flux has them."),
    click.option("--width", type=_PIXELS, help="See --height."),
)


def hint_option(known: Sequence[Parameter[Any]] = PARAMETERS) -> Decorator[Any]:
    """`--hint`, given as `hints` to the command: the `Hints` of all of them together."""

    def read(context: click.Context, option: click.Parameter, written: tuple[str, ...]) -> Hints:
        pairs = [(name.strip(), value) for name, _, value in (one.partition("=") for one in written)]
        names = [parameter.name for parameter in known]
        read = {name for parameter in known for name in parameter.names}
        for name, value in pairs:
            if name not in read or not value.strip():
                raise click.BadParameter(f"{name}={value!r:.80}; expected NAME=VALUE, NAME one of {', '.join(names)}")
        try:
            return Hints.of(collect(pairs))
        except BadRequest as error:
            raise click.BadParameter(error.message) from error

    return click.option("--hint", "hints", multiple=True, metavar="NAME=VALUE", callback=read,
                        help="What neither the input nor the model tells, such as num_frames=25; may be given again. Names: "
                        f"{', '.join(parameter.name for parameter in known)}.")  # fmt: skip


def scaling(which: str | None, factor: float | None, shift: float | None) -> Scaling:
    """Factors that are given, else what --scaling says. Raises click.UsageError."""
    if factor is None and shift is None:
        return Scaling(own=which != "none")
    if which is not None:
        raise click.UsageError(f"--scaling {which} and factors exclude each other; leave out one of them")
    try:
        return Scaling(False, factor, shift)
    except BadRequest as error:
        raise click.UsageError(error.message) from error


def endpoint_of(arguments: Sequence[str], example: str = "/demo") -> tuple[str, list[str]]:
    """The URL that the arguments begin with, else that of the environment; and the other arguments."""
    if arguments and _URL.match(arguments[0]):
        return arguments[0], list(arguments[1:])
    if arguments and _ADDRESS.match(arguments[0]) and not Path(arguments[0]).exists():
        raise click.UsageError(f"{arguments[0]} is no URL; is it http://{arguments[0]}?")
    if from_environment := os.environ.get(ENDPOINT):
        return from_environment, list(arguments)
    raise click.UsageError(
        f"The endpoint is missing: begin with a URL such as http://127.0.0.1:8000{example}, or set {ENDPOINT}"
    )


def endpoint_and_files(arguments: Sequence[str], suffixes: tuple[str, ...]) -> tuple[str, list[Path]]:
    """The endpoint, and the files that the other arguments mean. Raises click.UsageError."""
    endpoint, names = endpoint_of(arguments)
    if not names:
        raise click.UsageError("No input is given: name a file, a folder, or - for standard input")
    try:
        return endpoint, files.found(map(Path, names), suffixes)
    except FileError as error:
        raise click.UsageError(error.message) from error


def transport(
    endpoint: str,
    connections: int,
    token: str | None,
    timeout: float | None,
    deadline: float | None,
    retries: int | None,
) -> HttpTransport:
    """What the options of `connection` ask for. Raises BadRequest."""
    retry_policy = RetryPolicy(DEFAULT_TIMEOUT if timeout is None else timeout, deadline, retries)
    return HttpTransport(endpoint, retry_policy, connections, token)
