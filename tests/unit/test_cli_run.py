"""`remote-vae-serve run` and `deploy`: what they start, in which environment, by which proxy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from test_cli import SHIPPED, Config, command, here

from remote_vae.ray_internals import (
    DEATH_VARIABLES,
    FAST_VARIABLES,
    HAPROXY_BINARY_VARIABLE,
    PORT_VARIABLES,
    RECOVERY_VARIABLES,
)
from remote_vae_serve.haproxy import command as haproxy_command
from remote_vae_serve.launcher import session

__all__ = ["here"]  # a fixture


@pytest.fixture
def taken() -> set[int]:
    """Ports of this machine that somebody listens on."""
    return set()


@pytest.fixture
def started(here: Path, taken: set[int], monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The environments of the servers that `run` would have started."""
    environments: list[Config] = []
    monkeypatch.setattr(session, "run", lambda _, environment: environments.append(environment) or 0)
    monkeypatch.setattr("remote_vae_serve.cli.is_taken", lambda *_: False)
    monkeypatch.setattr("remote_vae_serve.launcher.ports.is_taken", lambda _, port: port in taken)
    command("init")
    return environments


def test_a_second_server_under_haproxy_takes_other_ports(started: list[Config], taken: set[int]) -> None:
    command("run", "--haproxy")
    taken |= {8404, 9101}
    command("run", "--haproxy", RAY_SERVE_HAPROXY_METRICS_PORT="9101")
    command("run", "--proxy", "python")
    changed = [{key: value for key, value in one.items() if key in PORT_VARIABLES} for one in started]
    assert [sorted(one) for one in changed] == [
        [],
        ["RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"],
        [],
    ]
    assert changed[1]["RAY_SERVE_HAPROXY_METRICS_PORT"] == "9101"
    assert int(changed[1]["RAY_SERVE_HAPROXY_STATS_PORT"]) not in (8404, 9101)


def test_deploy_starts_an_interpreter_that_shows_rays_token(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("subprocess.run", lambda words, **how: ran.append((words, how["env"])) or Mock(returncode=3))
    command("init")
    assert command("deploy", RAY_AUTH_TOKEN="x").exit_code == 3
    words, environment = ran[0]
    assert words[1:] == ["-m", "remote_vae_serve.launcher.deployment", "http://127.0.0.1:8265", "serve_config.yaml"]
    assert environment["RAY_AUTH_MODE"] == "token"
    (here / "serve_config.yaml").write_text("applications: nonsense")
    assert (command("deploy").exit_code, len(ran)) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "is_haproxy"),
    [
        (("--proxy", "python"), False),
        (("--proxy", "haproxy"), True),
        (("--haproxy",), True),
        (("--fast",), True),
    ],
)
def test_run_takes_the_proxy_that_is_asked_for(started: list[Config], flags: tuple[str, ...], is_haproxy: bool) -> None:
    """Whatever the environment says."""
    assert command("run", *flags, RAY_SERVE_ENABLE_HA_PROXY=str(int(not is_haproxy))).exit_code == 0
    assert (started.pop()["RAY_SERVE_ENABLE_HA_PROXY"] == "1") == is_haproxy


def test_what_the_operator_has_set_for_haproxy_stays(started: list[Config]) -> None:
    assert command("run", "--haproxy", RAY_SERVE_HAPROXY_TUNE_BUFSIZE="16384").exit_code == 0
    environment = started.pop()
    assert environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] == "16384"
    assert environment.items() >= (FAST_VARIABLES | {"RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "16384"}).items()


def test_auto_is_haproxy_wherever_that_runs(started: list[Config], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = here / "haproxy"
    monkeypatch.setattr("remote_vae_serve.launcher.proxy_choice.haproxy_binary", lambda: str(binary))
    for script, said in (("exit 0", ""), ("exit 1", "no HAProxy runs here"), (None, "no HAProxy runs here")):
        if script is None:
            binary.unlink()
        else:
            binary.write_text(f"#!/bin/sh\n{script}\n")
            binary.chmod(0o755)
        for flags in ((), ("--proxy", "auto")):
            result = command("run", *flags)
            assert result.exit_code == 0
            assert (started.pop()["RAY_SERVE_ENABLE_HA_PROXY"] == "1") == (not said)
            assert said in result.stderr
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    elsewhere = ("run", "--address", "10.0.0.1:6379")
    said = command(*elsewhere).stderr
    assert "has its own environment" in said
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in said
    assert started.pop()["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "RAY_SERVE_ENABLE_HA_PROXY" in command(*elsewhere, "--proxy", "haproxy").stderr
    assert started.pop()["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_the_pages_that_are_allowed_reach_every_process_whoever_names_them(started: list[Config], here: Path) -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    next(app for app in config["applications"] if app["name"] == "remote-vae")["args"]["allow_origins"] = ["http://a"]
    (here / "pages.yaml").write_text(yaml.safe_dump(config))
    given = ("--allow-origin", "http://b", "--allow-origin", "http://c")
    for flags, environment, told in (
        ((), {}, "http://a"),
        (given, {}, "http://b,http://c"),
        ((), {"REMOTE_VAE_ALLOW_ORIGINS": "http://d"}, "http://d"),
        (given, {"REMOTE_VAE_ALLOW_ORIGINS": "http://d"}, "http://b,http://c"),
        ((), {"REMOTE_VAE_ALLOW_ORIGINS": ""}, ""),
    ):
        assert command("run", "pages.yaml", "--proxy", "python", *flags, **environment).exit_code == 0
        assert started.pop()["REMOTE_VAE_ALLOW_ORIGINS"] == told
    command("run", "--proxy", "python")
    assert "REMOTE_VAE_ALLOW_ORIGINS" not in started.pop()
    refused = command("run", "--proxy", "python", "--allow-origin", "page.example/")
    assert (refused.exit_code, started) == (2, [])
    assert "allow_origins has 'page.example/'; expected" in refused.stderr


def test_haproxy_is_not_given_a_certificate_that_it_would_ignore(started: list[Config], here: Path) -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    config["http_options"] |= {"ssl_certfile": "server.crt", "ssl_keyfile": "server.key"}
    (here / "tls.yaml").write_text(yaml.safe_dump(config))
    refused = command("run", "tls.yaml", "--haproxy")
    assert (refused.exit_code, started) == (2, [])
    assert "no TLS of its own" in refused.stderr
    assert "no TLS of its own" in command("run", "tls.yaml").stderr
    assert started.pop()["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@pytest.fixture
def script(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Serve would start as its HAProxy."""
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    return here / haproxy_command.NAME


def test_run_has_serve_start_haproxy_by_our_program(started: list[Config], script: Path) -> None:
    script.touch(0o755)
    assert command("run", "--haproxy").stderr == ""
    environment = started.pop()
    assert environment[HAPROXY_BINARY_VARIABLE] == str(script)
    assert haproxy_command.METRICS_HOST not in environment  # loopback


def test_run_passes_on_which_haproxy_the_operator_has_chosen(started: list[Config], script: Path) -> None:
    script.touch(0o755)
    assert command("run", "--haproxy", **{HAPROXY_BINARY_VARIABLE: "/opt/haproxy"}).exit_code == 0
    environment = started.pop()
    assert (environment[HAPROXY_BINARY_VARIABLE], environment[haproxy_command.BINARY]) == (str(script), "/opt/haproxy")


def test_run_leaves_haproxy_alone_and_says_so_where_our_program_is_not(started: list[Config], script: Path) -> None:
    """Serve would not start with the path of a file that is not there."""
    result = command("run", "--fast")  # the flag's former name
    assert result.exit_code == 0
    assert f"{script.name} is not beside " in result.stderr
    environment = started.pop()
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert HAPROXY_BINARY_VARIABLE not in environment
    assert command("run", "--proxy", "python").stderr == ""


@pytest.mark.parametrize("flags", [("--proxy", "python"), ("--haproxy",)])
def test_run_has_serve_replace_a_dead_proxy_soon(started: list[Config], flags: tuple[str, ...]) -> None:
    """By Serve's own checks it is half a minute of refused connections."""
    assert command("run", *flags).exit_code == 0
    assert started.pop().items() >= (RECOVERY_VARIABLES | DEATH_VARIABLES).items()
