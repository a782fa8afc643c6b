"""`remote-vae-serve`: the launcher, and what an operator does by hand. What is slow to import is imported where it is used.

Exit codes: 0, 1 where something failed, 2 where the command or the configuration is wrong. Sentences go to stderr.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click

from remote_vae.ray_internals import (
    DASHBOARD_VARIABLE,
    DEATH_VARIABLES,
    HAPROXY_VARIABLE,
    LOOPBACK_VARIABLES,
    MIDDLEWARE_VARIABLE,
    RECOVERY_VARIABLES,
    token_mode,
)
from remote_vae_serve import proxy
from remote_vae_serve.haproxy import command as haproxy_command
from remote_vae_serve.launcher import proxy_choice, session
from remote_vae_serve.launcher.ports import haproxy_ports, is_taken
from remote_vae_serve.launcher.proxy_choice import NO_TLS, Proxy, why_python
from remote_vae_serve.launcher.spill_directory import has_room, spill_directory
from remote_vae_serve.middleware import settings

if TYPE_CHECKING:
    from remote_vae_serve.config import VAEConfig
    from remote_vae_serve.serve_config import ServeConfig

CONFIG = Path("serve_config.yaml")

config_argument = click.argument("config", type=click.Path(path_type=Path), default=CONFIG)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Serve VAEs with Ray Serve.

    \b
    Example: remote-vae-serve init && remote-vae-serve run
    """


@main.command()
@config_argument
@click.option(
    "--proxy",
    "asked",
    type=click.Choice(get_args(Proxy)),
    default="auto",
    show_default=True,
    help="Who takes the requests: HAProxy, which is faster, gives each model a path of its own and has no TLS; or Serve's proxy "
    "in Python. auto is HAProxy wherever that runs.",
)
@click.option("--haproxy", "--fast", "asked", flag_value="haproxy", help="The same as --proxy haproxy.")
@click.option(
    "--token",
    "tokens",
    multiple=True,
    help=f"Let in only who sends this token; may be repeated. {settings.TOKENS} in the environment (comma separated) does not "
    "show in the list of processes.",
)
@click.option(
    "--max-body-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="Refuse larger request bodies before they are read; max_body_mib of the ingress if not given, and not above it.",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    help="Let pages of this origin use the server from a browser (CORS), such as https://page.example, or * for all; may be "
    f"repeated. allow_origins of the ingress if neither this nor {settings.ALLOW_ORIGINS} is given.",
)
@click.option(
    "--address",
    default="local",
    show_default=True,
    help="Ray to serve on. `local` starts one; another must have these variables in its nodes' environment already.",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(min=0),
    help="Seconds that requests in flight have to finish after Ctrl-C or SIGTERM; request_timeout_s of the ingress if not given.",
)
def run(
    config: Path,
    asked: Proxy,
    tokens: tuple[str, ...],
    max_body_mib: float | None,
    allow_origins: tuple[str, ...],
    address: str,
    drain_s: float | None,
) -> None:
    """Check CONFIG (serve_config.yaml), then serve it until Ctrl-C or SIGTERM.

    Does what only environment variables can tell Serve (tokens, a size limit that holds before a body is read, JSON for
    Serve's own errors), then runs `serve run`. Serve is asked whether it does so: with tokens that it would not enforce,
    nothing is served, exit code 1. At the end requests in flight finish, within --drain-s seconds; a second signal does not wait.

    \b
    Example: REMOTE_VAE_TOKENS=s3cret remote-vae-serve run
    """
    checked = _read(config)
    if max_body_mib is not None and max_body_mib > checked.max_body_mib:
        _fail(f"--max-body-mib is {max_body_mib:g}, over the {checked.max_body_mib:g} of the ingress; raise max_body_mib "
              f"under args in {config}", code=2)  # fmt: skip
    if any("," in token or not token.strip() for token in tokens):
        _fail("--token takes one token, without commas; repeat it for more", code=2)
    haproxy = _takes_haproxy(asked, checked, address)
    by_our_program = haproxy_command.variables(os.environ)
    if haproxy and by_our_program is None:
        click.echo(f"{haproxy_command.NAME} is not beside {sys.executable}, so HAProxy answers as Serve has it "
                   "(docs/errors.md); install remote-vae anew", err=True)  # fmt: skip
    origins = allow_origins or (() if settings.ALLOW_ORIGINS in os.environ else checked.allow_origins)
    variables = {
        **RECOVERY_VARIABLES,
        **DEATH_VARIABLES,
        MIDDLEWARE_VARIABLE: proxy.IMPORT_PATH,
        settings.MAX_BODY_MIB: str(max_body_mib or checked.max_body_mib),
        **({settings.TOKENS: ",".join(tokens)} if tokens else {}),
        **({settings.ALLOW_ORIGINS: ",".join(origins)} if origins else {}),
        **proxy_choice.variables(haproxy, os.environ),
        **(haproxy_ports(os.environ) if haproxy and address == "local" else {}),
        **((by_our_program or {}) | LOOPBACK_VARIABLES if address == "local" else {}),
    }
    try:
        read = settings.Settings.of(os.environ | variables)
    except ValueError as error:
        _fail(str(error), code=2)
    if not read.tokens and checked.host not in ("127.0.0.1", "localhost", "::1"):
        click.echo(f"No token is set: whoever reaches {checked.host}:{checked.port} may use this server.", err=True)
    if address != "local":
        theirs = ", ".join(name for name in variables if name != HAPROXY_VARIABLE or haproxy)
        click.echo(f"The Ray at {address} keeps its own environment: start its nodes with {theirs}.", err=True)
    if address == "local" and not has_room():
        click.echo("There is no room in /dev/shm, so Ray may keep latents and results in files (docs/operate.md); in a "
                   "container, --shm-size gives it some", err=True)  # fmt: skip
    if address == "local" and is_taken(checked.host, checked.port):
        _fail(f"{checked.host}:{checked.port} is in use, perhaps by another remote-vae; stop that one, or change "
              f"http_options.port in {config}")  # fmt: skip
    # A new interpreter, the very one that runs this: Ray reads these variables when it is imported, and here it is already.
    drain_s = checked.request_timeout_s if drain_s is None else drain_s
    command = [sys.executable, "-m", "remote_vae_serve.launcher.server", address, str(config), str(drain_s)]
    with spill_directory(os.environ, is_ours=address == "local") as spill:
        code = session.run(command, {**os.environ, **variables, **spill})
    sys.exit(code)


@main.command(short_help="Change the models of a server that runs.")
@config_argument
@click.option(
    "--address",
    default="http://127.0.0.1:8265",
    envvar=DASHBOARD_VARIABLE,
    show_default=True,
    help="Dashboard of its Ray, which the server's log names.",
)
def deploy(config: Path, address: str) -> None:
    """Check CONFIG (serve_config.yaml), then have a server that runs be what it says; who is not changed goes on.

    As `serve deploy`, which would take away the paths that models have of their own under HAProxy.

    \b
    Example: remote-vae-serve deploy
    """
    _read(config)
    # A new interpreter: Ray reads how to show its token when it is imported, and here it is already.
    command = [sys.executable, "-m", "remote_vae_serve.launcher.deployment", address, str(config)]
    sys.exit(subprocess.run(command, env=os.environ | token_mode(os.environ), check=False).returncode)


@main.command(short_help="Write a configuration to start from.")
@click.argument("path", type=click.Path(path_type=Path), default=CONFIG)
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def init(path: Path, force: bool) -> None:
    """Write a configuration to start from to PATH (serve_config.yaml).

    \b
    Example: remote-vae-serve init && remote-vae-serve run
    """
    path = path / CONFIG if path.is_dir() else path
    if path.exists() and not force:
        _fail(f"{path} exists; --force overwrites it", code=2)
    try:
        shutil.copyfile(_template(), path)
    except OSError as error:
        _fail(f"{path} cannot be written: {error.strerror}")
    click.echo(f"Wrote {path}. Serve it with: remote-vae-serve run {path}")


@main.command(short_help="Check a configuration, and start nothing.")
@config_argument
def check(config: Path) -> None:
    """Check CONFIG (serve_config.yaml) as `run` does, and start nothing.

    \b
    Example: remote-vae-serve check my_config.yaml
    """
    checked = _read(config)
    click.echo(f"{config} can be served; its models: {', '.join(sorted(checked.models)) or 'none'}")


@main.command(short_help="Download the weights of a configuration.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--config", type=click.Path(path_type=Path), default=CONFIG, show_default=True, help="Whose models.")
def fetch(models: tuple[str, ...], config: Path) -> None:
    """Download the weights of each MODEL of a configuration, or of all, to this node's cache.

    Only safetensors and config.json come. Where to is Hugging Face's own business: HF_HOME. A gated model needs HF_TOKEN.

    \b
    Example: remote-vae-serve fetch sd-v1 flux
    """
    served = _read(config).models
    if unknown := [model for model in models if model not in served]:
        _fail(f"{config} has no model {', '.join(unknown)}; it has {', '.join(served) or 'none'}", code=2)
    from remote_vae.errors import ModelFailed
    from remote_vae_serve.engine import weights

    failed = False
    for name in models or served:
        if served[name].fake is not None:
            click.echo(f"{name}: a fake engine, which has no weights")
            continue
        try:
            fetched = weights.fetch(served[name])
        except ModelFailed as error:
            failed = True
            click.echo(f"{name}: {error.message}", err=True)
        else:
            click.echo(f"{name}: {fetched.folder}")
    if failed:
        sys.exit(1)


@main.command(short_help="Print the application of a model.")
@click.argument("source")
@click.option("--subfolder", help="Folder of the VAE inside the source, e.g. vae.")
@click.option("--name", help="What to call the model; made from the source if not given.")
def add(source: str, subfolder: str | None, name: str | None) -> None:
    """Print the application of a model, a Hub id or a local folder, to append to a configuration.

    \b
    Example: remote-vae-serve add my-org/my-pipeline --subfolder vae >> serve_config.yaml
    """
    from remote_vae.errors import ModelFailed
    from remote_vae_serve.config import VAEConfig
    from remote_vae_serve.engine import weights
    from remote_vae_serve.engine.model_config import latent_space
    from remote_vae_serve.families.table import GENERIC
    from remote_vae_serve.http.app import RESERVED
    from remote_vae_serve.ingress.model_registry import NAME

    folder = Path(source).expanduser()
    if source != "demo" and folder.is_dir():
        source = str(folder.resolve())  # replicas have a working directory of their own
    name = name if name is not None else _name_of(source, RESERVED)
    if name in RESERVED or not NAME.fullmatch(name):
        _fail(f"{name!r} is reserved or not of the form [a-z0-9][a-z0-9._-]*; choose another with --name", code=2)
    config = VAEConfig.model_validate({"source": source, "subfolder": subfolder})
    try:
        space = latent_space(weights.config_of(config), source)
    except ModelFailed as error:
        _fail(error.message)
    family = "no family of its own, so the generic row" if space.family is GENERIC else space.family.name
    comment = f"{space.class_name}, {space.channels} latent channels: {family}; hints: {', '.join(space.takes)}"
    click.echo(_block(name, config, comment), nl=False)


def _takes_haproxy(asked: Proxy, checked: ServeConfig, address: str) -> bool:
    if asked == "haproxy" and checked.has_tls:
        _fail(f"--proxy haproxy: {NO_TLS}; leave that out, or say --proxy python", code=2)
    why_not = why_python(checked.has_tls, address) if asked == "auto" else None
    if why_not is not None:
        click.echo(f"Serve's own proxy takes the requests: {why_not}", err=True)
    return asked != "python" and why_not is None


def _read(path: Path) -> ServeConfig:
    from remote_vae_serve.serve_config import InvalidConfig, ServeConfig

    try:
        return ServeConfig.read(path)
    except InvalidConfig as error:
        _fail("\n".join(error.problems), code=2)


def _template() -> Path:
    """The shipped configuration: beside this file in a wheel, at the repository's root in an editable install."""
    shipped = Path(__file__).with_name(CONFIG.name)
    return shipped if shipped.exists() else Path(__file__).parents[2] / CONFIG.name


def _name_of(source: str, reserved: frozenset[str]) -> str:
    """A model's name from the last part of its source that says more than `vae`."""
    parts = [part for part in source.lower().split("/") if part]
    last = next((part for part in reversed(parts) if part != "vae"), "vae")
    name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("._-") or "vae"
    return f"{name}-vae" if name in reserved else name


def _block(name: str, config: VAEConfig, comment: str) -> str:
    import yaml

    arguments = yaml.safe_dump(config.model_dump(exclude_none=True, exclude_defaults=True), default_flow_style=True,
                               sort_keys=False, width=10_000).strip()  # fmt: skip
    return (
        f"\n  - name: {yaml.safe_dump(name).splitlines()[0]} # {comment}\n"
        "    route_prefix: null\n"
        "    import_path: remote_vae_serve.app:vae\n"
        f"    args: {arguments}\n"
        "    deployments:\n"
        "      - name: VAE\n"
        "        autoscaling_config:\n"
        f"{textwrap.indent(yaml.safe_dump(_from_zero(), sort_keys=False), ' ' * 10)}"
    )


def _from_zero() -> dict[str, Any]:
    """How the shipped configuration scales its models: from no replica."""
    import yaml

    deployments = [
        d for app in yaml.safe_load(_template().read_text())["applications"] for d in app.get("deployments", [])
    ]
    scaling: dict[str, Any] = next(d["autoscaling_config"] for d in deployments if "autoscaling_config" in d)
    return scaling


def _fail(sentence: str, code: int = 1) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main(prog_name="remote-vae-serve")
