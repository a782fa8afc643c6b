"""The configuration of HAProxy that Serve writes, edited: over what the installed Serve writes, and read by HAProxy itself."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from haproxy_binary import why_no_haproxy
from remote_vae import errors
from remote_vae.ray_internals import haproxy_binary
from remote_vae_serve.haproxy import config, replies
from remote_vae_serve.haproxy.config import edited
from remote_vae_serve.middleware import serve_errors

APPLICATIONS = {"remote-vae": "/", "flux": "/flux"}


@pytest.fixture(scope="module")
def serves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Serve writes: an ingress, and a model with a path of its own."""
    folder = tmp_path_factory.mktemp("haproxy")
    cfg = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        has_received_routes=True,
        has_received_servers=True,
    )
    backends = {
        f"http-{name}": BackendConfig(
            name=f"http-{name}",
            path_prefix=prefix,
            app_name=name,
            protocol=RequestProtocol.HTTP,
            servers=[ServerConfig(name=f"SERVE_REPLICA-{name}", host="127.0.0.1", port=30000)],
        )
        for name, prefix in APPLICATIONS.items()
    }
    path = folder / "haproxy.cfg"
    HAProxyApi(cfg=cfg, backend_configs=backends, config_file_path=str(path))._generate_config_file_internal()
    return path.read_text()


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line[:1].strip():
            found[line] = lines = []
        elif line.strip():
            lines.append(line.strip())
    return found


def changes(before: str, after: str) -> dict[str, tuple[set[str], set[str]]]:
    """Of each section that changed, the lines that are gone and those that came."""
    old, new = sections(before), sections(after)
    assert list(old) == list(new)
    return {
        name: (set(old[name]) - set(new[name]), set(new[name]) - set(old[name]))
        for name in old
        if old[name] != new[name]
    }


def test_every_edit_has_its_place_in_what_the_installed_serve_writes(serves: str) -> None:
    left_out: list[str] = []
    edited(serves, has_tokens=True, left_out=left_out.append)
    assert not left_out, "a new Ray writes HAProxy's configuration otherwise"


def test_nothing_else_changes(serves: str) -> None:
    changed = changes(serves, edited(serves))
    assert {name: (len(gone), len(came)) for name, (gone, came) in changed.items()} == {
        "global": (0, 1),
        "defaults": (0, 6),
        "frontend prometheus": (1, 1),
        "backend default_backend": (1, 1),
        "backend http-remote-vae": (0, 1),
        "listen stats": (1, 1),
    }


@pytest.mark.skipif(why_no_haproxy() is not None, reason=str(why_no_haproxy()))
@pytest.mark.parametrize("has_tokens", [False, True])
def test_haproxy_takes_it(serves: str, has_tokens: bool, tmp_path: Path) -> None:
    written = tmp_path / "haproxy.cfg"
    written.write_text(edited(serves, has_tokens=has_tokens))
    run = subprocess.run([haproxy_binary(), "-c", "-f", str(written)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_metrics_and_statistics_are_told_on_loopback(serves: str) -> None:
    changed = changes(serves, edited(serves))
    assert changed["frontend prometheus"] == ({"bind :9101"}, {"bind 127.0.0.1:9101"})
    assert changed["listen stats"] == ({"bind *:8404"}, {"bind 127.0.0.1:8404"})


def test_metrics_alone_are_told_elsewhere_where_that_is_asked_for(serves: str) -> None:
    text = edited(serves, metrics_host="0.0.0.0")
    assert "bind 0.0.0.0:9101" in sections(text)["frontend prometheus"]
    assert "bind 127.0.0.1:8404" in sections(text)["listen stats"]


def test_with_tokens_haproxy_does_not_tell_the_routes_itself(serves: str) -> None:
    def answers(text: str) -> list[str]:
        return [
            line for line in sections(text)["frontend http_frontend"] if re.match(r"http-request return .*routes", line)
        ]

    assert answers(edited(serves))
    assert not answers(edited(serves, has_tokens=True))


def test_an_ingress_that_does_not_exist_yet_is_not_missed(serves: str) -> None:
    text = re.sub(r"^\s*(acl is_http-remote-vae |use_backend http-remote-vae ).*$", "", serves, flags=re.MULTILINE)
    left_out: list[str] = []
    edited(text, left_out=left_out.append)
    assert not left_out


@pytest.mark.parametrize(
    ("was", "becomes", "what"),
    [
        ("    bind :9101", "    bind unix@metrics", "metrics on loopback"),
        ("  bind *:8404", "  bind *:8404\n  bind [::]:8404", "statistics on loopback"),
        ("listen stats", "listen statistics", "statistics on loopback"),
        ("return status 404", "deny status 404", "JSON where no application is"),
        ("global\n", "process\n", "more headers"),
        ("if routes\n", "if routes !hidden\n", "a token for /-/routes"),
        ("defaults\n", "defaults ours\n", "JSON for HAProxy's own errors, and who asked"),
    ],
)
def test_an_edit_without_a_place_is_left_out_and_said(serves: str, was: str, becomes: str, what: str) -> None:
    other = serves.replace(was, becomes)
    left_out: list[str] = []
    text = edited(other, has_tokens=True, left_out=left_out.append)
    assert left_out == [what]
    assert becomes.strip() in text
    assert len(changes(other, text)) == 6  # of seven


def own_errors() -> Iterator[tuple[str, type[errors.RemoteVAEError], str | None]]:
    kinds = {400: errors.BadRequest, 502: errors.Unavailable, 503: errors.Unavailable, 504: errors.DeadlineExceeded}
    waits = {502: "1", 503: "2"}  # of a death mostly another answers
    for line, (status, kind) in zip(replies.http_errors(), kinds.items(), strict=True):
        assert line.startswith(f"http-error status {status} content-type application/json hdr ")
        yield line, kind, waits.get(status)
    yield replies.no_application(), errors.UnknownRoute, "2"


@pytest.mark.parametrize(("line", "kind", "wait"), list(own_errors()))
def test_what_haproxy_says_is_the_contracts_json(
    line: str, kind: type[errors.RemoteVAEError], wait: str | None
) -> None:
    *words, form, body = shlex.split(line)  # as HAProxy reads it
    assert form == "lf-string"
    headers = {name: value for hdr, name, value in zip(words, words[1:], words[2:], strict=False) if hdr == "hdr"}
    # Written by HAProxy for each answer: the same in the header as in the body.
    assert json.loads(body)["request_id"] == headers["x-request-id"] == "%[unique-id]"
    assert re.sub(r"%\[(unique-id|path,bytes\(0,80\),json\(ascii\))\]", "", body).count("%") == 0
    assert type(errors.parse(int(words[words.index("status") + 1]), {}, body.encode())) is kind
    assert headers.get("retry-after") == wait


def test_haproxy_and_serves_proxy_say_the_same_where_nothing_is_served() -> None:
    body = shlex.split(replies.no_application())[-1]
    assert json.loads(body)["error"] == serve_errors.nothing_at(replies.PATH).message


def test_no_more_is_taken_than_serves_own_proxy_takes() -> None:
    assert 101 < config.MAX_HEADERS < 32767  # HAProxy's own, and its most
