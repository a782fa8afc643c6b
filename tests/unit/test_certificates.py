"""A server whose certificate the client's machine does not trust: asked once, named for what it is, and made good."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from failing_server import Z, cut, decode, echo, hang_up, in_turn, skip_sleeps
from limits import WAIT_S, stretched
from remote_vae import Waiting, list_models
from remote_vae.errors import Cancelled, ConnectionFailed, UntrustedCertificate
from samples import latents, tiny_vae
from scripted_server import Exchange, ScriptedServer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself; the key beside it."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", folder / "key.pem", "-out",
         folder / "cert.pem", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-addext",
         "keyUsage=critical,digitalSignature,keyCertSign"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem"


@pytest.fixture
def url(certificate: Path) -> Iterator[str]:
    with in_turn(echo) as server:
        yield secured(server, certificate)


def secured(server: ScriptedServer, certificate: Path) -> str:
    """Its URL, which is one of HTTPS from now on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    return server.url.replace("http://", "https://")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_sleeps(monkeypatch)


def test_a_certificate_that_is_not_trusted_is_named_and_asked_for_once(url: str, slept: list[float]) -> None:
    for ask in (decode, list_models):
        with pytest.raises(UntrustedCertificate, match="REQUESTS_CA_BUNDLE") as caught:
            ask(url, retries=3)
        assert isinstance(caught.value, ConnectionFailed)
    assert not slept


def test_a_port_without_tls_is_no_matter_of_certificates(slept: list[float]) -> None:
    with in_turn(echo) as server, pytest.raises(ConnectionFailed) as caught:
        decode(server.url.replace("http://", "https://"), retries=1)
    assert type(caught.value) is ConnectionFailed
    assert len(slept) == 1


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_wrong_path_of_certificates_is_named_with_its_variable_and_asked_for_once(
    url: str, slept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, is_there: bool
) -> None:
    path = tmp_path / "bundle.pem"
    if is_there:
        path.write_text("no certificate")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv(variable, str(path))
    for ask in (decode, list_models):
        with pytest.raises(UntrustedCertificate) as caught:
            ask(url, retries=3)
        assert f"{variable} is {str(path)!r}" in str(caught.value)
    assert not slept


def test_a_wrong_path_of_certificates_is_not_blamed_for_a_line_that_breaks(
    slept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with in_turn(cut, hang_up, echo) as server:
        assert torch.equal(decode(server.url, retries=2), Z)
    assert len(slept) == 2


def test_the_fallback_makes_it_good(url: str) -> None:
    vae, z = tiny_vae("tiny"), latents(1, 4, 2, 2)
    assert torch.equal(decode(url, z, fallback=vae), vae.decode(z).sample)


def test_what_the_error_advises_helps(url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert torch.equal(decode(url), Z)


def test_a_wait_over_tls_is_ended_as_any_other(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    has_left, cancelled = threading.Event(), []

    def silence(exchange: Exchange) -> None:
        exchange.connection.settimeout(WAIT_S)
        if exchange.connection.recv(1) == b"":
            has_left.set()
        exchange.close_connection = True

    def stop(waiting: Waiting) -> None:
        if waiting.seconds > 0.5:
            cancelled.append(time.monotonic())
            raise Cancelled("by its user")

    with ScriptedServer(silence) as server:
        with pytest.raises(Cancelled, match="by its user"):
            decode(secured(server, certificate), on_wait=stop)
        assert time.monotonic() - cancelled[0] < stretched(1)
        assert has_left.wait(WAIT_S)
