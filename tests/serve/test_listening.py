"""Who can reach what of a server that the launcher has started: every socket on which one of its processes listens."""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import requests

from haproxy_binary import why_no_haproxy
from limits import WAIT_S
from local_server import LocalServer

pytestmark = [
    pytest.mark.slow,  # whole servers
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux tells which process listens where"),
]
LISTENS = "0A"
REPLICA = "ray::ServeReplica"
CALL = "/ray.serve.ASGIService/HandleRequest"
# What Ray hard-codes, by the process's command; docs/operate.md says who may reach it.
EVERYWHERE = {REPLICA}
TOKEN = "s3cret-of-the-test"


class Socket(NamedTuple):
    """One on which a process listens."""

    address: str
    port: int
    command: str

    @property
    def is_on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


def listening(pids: list[int]) -> Iterator[Socket]:
    inodes = {inode: where for table in ("tcp", "tcp6") for inode, where in _table(Path("/proc/net", table))}
    for pid in pids:
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if (where := inodes.get(os.readlink(descriptor))) is not None:
                        yield Socket(*where, command)


def _table(path: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """What `/proc/PID/fd/N` is called, and where it listens."""
    for line in path.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENS:
            address, port = fields[1].split(":")
            words = [bytes.fromhex(address[start : start + 8])[::-1] for start in range(0, len(address), 8)]
            yield f"socket:[{fields[9]}]", (str(ipaddress.ip_address(b"".join(words))), int(port, 16))


def answer_to_a_stranger(port: int) -> grpc.StatusCode | None:
    """What a replica says to a call without Ray's token: its arguments would be unpickled."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(CALL)(b"", timeout=WAIT_S)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[no-any-return]
    return None


@pytest.fixture(scope="module", params=["python", "haproxy"])
def server(request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    command = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--token", TOKEN, "--proxy", request.param)
    if request.param == "haproxy" and (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    with LocalServer(command=command, token=TOKEN) as running:
        yield running


def test_only_what_ray_hard_codes_listens_beyond_loopback(server: LocalServer) -> None:
    found = set(listening(server.processes()))
    ports = [socket.port for socket in found if socket.command.startswith(REPLICA) and not socket.is_on_loopback]
    assert {answer_to_a_stranger(port) for port in ports} == {grpc.StatusCode.UNAUTHENTICATED}
    assert any(socket.is_on_loopback and f"{socket.port}" in server.url for socket in found)
    beyond = {
        (socket.command.split()[0].rpartition("/")[2], socket.port) for socket in found if not socket.is_on_loopback
    }
    assert all(any(command.startswith(name) for name in EVERYWHERE) for command, _ in beyond), sorted(beyond)
    assert len(found) > 5


@pytest.mark.parametrize("path", ["/-/routes", "/-/ROUTES", "/models"])
def test_names_are_told_to_who_has_a_token(server: LocalServer, path: str) -> None:
    refused = requests.get(server.url + path, timeout=WAIT_S)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")


def test_serves_own_pages_are_there_for_who_may_read_them(server: LocalServer) -> None:
    routes = requests.get(f"{server.url}/-/routes", headers={"authorization": f"Bearer {TOKEN}"}, timeout=WAIT_S)
    assert routes.json()["/"] == "remote-vae"
    assert requests.get(f"{server.url}/-/healthz", timeout=WAIT_S).text == "success"


def test_no_token_is_written_beside_haproxys_configuration(server: LocalServer) -> None:
    """Our file is its owner's alone. Serve's own stands in the command too, by which Serve knows its HAProxies."""
    for pid in server.processes("haproxy -db"):
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        ours, serves = (Path(arguments[arguments.index(option) + 1]) for option in ("-f", "-L"))
        assert stat.S_IMODE(ours.stat().st_mode) == 0o600
        assert ours.read_text() != serves.read_text()
        assert TOKEN not in ours.read_text()
