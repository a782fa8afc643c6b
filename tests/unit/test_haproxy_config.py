"""The configuration of HAProxy that Serve writes, edited: over what the installed Serve writes, and read by HAProxy itself."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from haproxy_binary import why_no_haproxy
from limits import WAIT_S
from local_server import free_port
from raw_http import exchange
from remote_vae import errors
from remote_vae.ray_internals import FAST_VARIABLES, haproxy_binary
from remote_vae_serve.haproxy import config, replies
from remote_vae_serve.haproxy.config import edited
from remote_vae_serve.middleware import serve_errors
from scripted_server import Exchange, ScriptedServer

needs_haproxy = pytest.mark.skipif(why_no_haproxy() is not None, reason=str(why_no_haproxy()))
APPLICATIONS = {"remote-vae": "/", "flux": "/flux"}


def written(folder: Path, applications: Mapping[str, str], replica: int = 30000, **settings: Any) -> str:
    """What Serve writes for applications at these paths, each with a replica at that port."""
    cfg = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=settings.pop("port", 8000)),
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        has_received_routes=True,
        has_received_servers=True,
        **settings,
    )
    backends = {
        f"http-{name}": BackendConfig(
            name=f"http-{name}",
            path_prefix=prefix,
            app_name=name,
            protocol=RequestProtocol.HTTP,
            servers=[ServerConfig(name=f"SERVE_REPLICA-{name}", host="127.0.0.1", port=replica)],
        )
        for name, prefix in applications.items()
    }
    path = folder / "haproxy.cfg"
    HAProxyApi(cfg=cfg, backend_configs=backends, config_file_path=str(path))._generate_config_file_internal()
    return path.read_text()


@pytest.fixture(scope="module")
def serves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ingress, and a model with a path of its own."""
    return written(tmp_path_factory.mktemp("haproxy"), APPLICATIONS)


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
    edited(serves, has_tokens=True, allow_origins=["*"], left_out=left_out.append)
    assert not left_out, "a new Ray writes HAProxy's configuration otherwise"


def test_nothing_else_changes(serves: str) -> None:
    changed = changes(serves, edited(serves))
    assert {name: (len(gone), len(came)) for name, (gone, came) in changed.items()} == {
        "global": (0, 1),
        "defaults": (0, 7),
        "frontend prometheus": (1, 1),
        "backend default_backend": (1, 1),
        "listen stats": (1, 1),
    }


@needs_haproxy
@pytest.mark.parametrize("has_tokens", [False, True])
@pytest.mark.parametrize("origins", [(), ("*",), ("null", *(f"https://[::1]:{port}" for port in range(3000, 3100)))])
def test_haproxy_takes_it(serves: str, has_tokens: bool, origins: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(edited(serves, has_tokens=has_tokens, allow_origins=origins))
    run = subprocess.run([haproxy_binary(), "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told = subprocess.run(
        [haproxy_binary(), "-c", "-f", "/dev/stdin"], input=serves, capture_output=True, text=True, check=False
    )
    assert run.stderr.count("WARNING") == told.stderr.count("WARNING")  # no more than of what Serve writes


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
    assert len(changes(other, text)) == 5  # of six


@contextmanager
def running(
    folder: Path, applications: Mapping[str, str], replica: int = 30000, allow_origins: Sequence[str] = ()
) -> Iterator[str]:
    """The URL of a HAProxy with our configuration."""
    port = free_port()
    ports = {"port": port, "metrics_port": free_port(), "stats_port": free_port()}
    bufsize = int(FAST_VARIABLES["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"])
    path = folder / "ours.cfg"
    path.write_text(
        edited(written(folder, applications, replica, bufsize=bufsize, **ports), allow_origins=allow_origins)
    )
    process = subprocess.Popen([haproxy_binary(), "-db", "-f", str(path)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                exchange(url, b"GET / HTTP/1.0\r\n\r\n")
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one that runs with our configuration, before there is an application."""
    with running(tmp_path_factory.mktemp("running"), {}) as url:
        yield url


@needs_haproxy
def test_a_replica_that_dies_under_a_request_is_a_502_on_used_connections_too(tmp_path: Path) -> None:
    def answer(exchange: Exchange) -> None:
        if exchange.path == "/flux/dies":
            exchange.close_connection = True
            exchange.connection.shutdown(socket.SHUT_RDWR)
        else:
            exchange.reply(200, {}, b"well")

    with (
        ScriptedServer(answer) as replica,
        running(tmp_path, {"flux": "/flux"}, urlsplit(replica.url).port or 0) as url,
        requests.Session() as session,
    ):
        for _ in range(3):
            assert session.post(f"{url}/flux", data=b"x", timeout=WAIT_S).text == "well"
        answered = session.post(f"{url}/flux/dies", data=b"x", timeout=WAIT_S)
        assert (answered.status_code, answered.json()["code"]) == (502, "unavailable")
        assert session.post(f"{url}/flux", data=b"x", timeout=WAIT_S).text == "well"


@needs_haproxy
@pytest.mark.parametrize("allowed", [("https://page.example", "null"), ("*",)])
def test_a_page_that_is_allowed_reads_what_haproxy_says_itself_and_no_other_does(
    allowed: tuple[str, ...], tmp_path: Path
) -> None:
    def answer(exchange: Exchange) -> None:
        cors = {"Access-Control-Allow-Origin": allowed[0], "Vary": "Accept, Origin"}  # as the application says itself
        exchange.reply(200, cors, b"well")

    with (
        ScriptedServer(answer) as replica,
        running(tmp_path, {"flux": "/flux"}, urlsplit(replica.url).port or 0, allowed) as url,
    ):
        page = {"Origin": allowed[0].replace("*", "https://any.example")}
        missing = requests.post(f"{url}/nothing", data=b"x", headers=page, timeout=WAIT_S)
        assert (missing.status_code, missing.json()["code"], missing.headers["vary"]) == (
            404,
            "unknown_route",
            "Origin",
        )
        preflight = requests.options(
            f"{url}/nothing", timeout=WAIT_S,
            headers=page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "a,b"},
        )  # fmt: skip
        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "a,b")
        well = requests.post(f"{url}/flux", data=b"x", headers=page, timeout=WAIT_S)
        assert (well.text, well.headers["vary"]) == ("well", "Accept, Origin")
        for readable in (missing, preflight, well):
            assert readable.headers["access-control-allow-origin"] == allowed[0]
            assert readable.headers["access-control-expose-headers"] == "*"
        others: list[dict[str, str]] = [{}] if allowed == ("*",) else [{}, {"Origin": "https://page.example.evil"}]
        for headers in others:
            other = requests.post(f"{url}/nothing", data=b"x", headers=headers, timeout=WAIT_S)
            assert "access-control-allow-origin" not in other.headers


PATHS = {
    "/fake": "/fake",
    "/fake?shape=1": "/fake",
    '/a"b': '/a"b',
    "/a\\": "/a\\",
    "/%22%0a%[unique-id]'": "/%22%0a%[unique-id]'",
    "/" + 79 * '"' + "more": "/" + 79 * '"',
    "/" + 60_000 * "n": "/" + 79 * "n",
    "*": "",
}


@needs_haproxy
@pytest.mark.parametrize(("path", "said"), PATHS.items(), ids=range(len(PATHS)))
def test_no_path_breaks_the_json_that_says_it_back(haproxy: str, path: str, said: str) -> None:
    answer = exchange(haproxy, f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.fields is not None, answer
    assert answer.fields["error"] == serve_errors.nothing_at(said).message
    assert (answer.status, answer.fields["code"]) == (404, "unknown_route")
    assert answer.headers["x-request-id"] == answer.fields["request_id"]
    assert answer.headers["retry-after"] == "2"


@needs_haproxy
def test_so_many_headers_are_read(haproxy: str) -> None:
    def status(headers: int) -> int:
        return exchange(haproxy, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * headers + b"\r\n").status

    assert [status(config.MAX_HEADERS - 10), status(config.MAX_HEADERS + 10)] == [404, 400]


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
