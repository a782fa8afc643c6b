"""`remote-vae-serve run`, the real thing: what holds under the launcher and would not under plain `serve run`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from limits import WAIT_S
from local_server import LocalServer, living
from remote_vae import RemoteVAE
from remote_vae.errors import BodyTooLarge, Unauthorized
from remote_vae.ray_internals import LOOPBACK_VARIABLES
from samples import latents

TOKEN = "s3cret-of-the-test"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32"}
BODY = latents(1, 4, 8, 8).numpy().tobytes()
DECODE_S = 2.0


def _two_applications(config: dict[str, Any]) -> None:
    ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
    ingress["args"]["max_body_mib"] = 1
    fake = {
        "name": "fake",
        "route_prefix": None,
        "import_path": "remote_vae_serve.app:vae",
        "args": {"source": "nowhere", "fake": {"decode_s": 0}, "num_cpus": 0},
    }
    slow = fake | {"name": "slow", "args": {"source": "nowhere", "fake": {"decode_s": DECODE_S}, "num_cpus": 0}}
    config["applications"] = [ingress, fake, slow]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    command = (
        sys.executable,
        "-m",
        "remote_vae_serve.cli",
        "run",
        "--proxy",
        "python",
        "--token",
        "another",
        "--token",
        TOKEN,
    )
    running = LocalServer(models=("fake", "slow"), change=_two_applications, command=command, token=TOKEN)
    with running:
        started = running.processes()
        yield running
        assert TOKEN not in running.log.read_text(errors="replace")
    assert len(started) > 1
    assert not living(started)


def raw(server: LocalServer, head: str, body: bytes = b"", timeout_s: float = WAIT_S) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what comes back within the time to bytes written by hand; the connection stays open meanwhile."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        answer = b""
        while True:
            answer += connection.recv(65536)
            top, _, text = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", top.lower())
            if length and len(text) >= int(length[1]):
                return int(answer.split()[1]), dict(json.loads(text))


def assert_contract(answer: requests.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_latent_becomes_a_picture_with_a_token_in_either_form(server: LocalServer) -> None:
    for url, headers in ((server.url, HEADERS), (server.url.replace("//", f"//:{TOKEN}@"), {})):
        answer = requests.post(f"{url}/fake", params=QUERY, data=BODY, headers=headers, timeout=WAIT_S)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg"), answer.text


def test_the_proxy_was_asked_for_its_middleware_before_anything_was_deployed(server: LocalServer) -> None:
    log = server.log.read_text(errors="replace")
    assert 0 < log.find("Tokens and size limit are in place: SERVE_PROXY") < log.find("Submitted deploy config")


def test_without_a_token_nothing_but_health_answers(server: LocalServer) -> None:
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).json()["status"] == "ok"
    for headers in ({}, {"authorization": "Bearer wrong"}):
        for path in ("fake", "models", "fake/decode"):
            answer = requests.post(f"{server.url}/{path}", params=QUERY, data=BODY, headers=headers, timeout=WAIT_S)
            assert_contract(answer, 401, "unauthorized")
    with RemoteVAE(f"{server.url}/fake") as vae, pytest.raises(Unauthorized):
        vae.decode(latents(1, 4, 8, 8))


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server: LocalServer) -> None:
    head = f"POST /fake HTTP/1.1\nhost: x\nauthorization: Bearer {TOKEN}\ncontent-length: {2**40}\n"
    status, fields = raw(server, head)
    assert (status, fields["code"]) == (413, "body_too_large")
    status, fields = raw(server, head.replace(f"content-length: {2**40}", "transfer-encoding: chunked"),
                         b"".join(b"10000\r\n" + bytes(0x10000) + b"\r\n" for _ in range(17)))  # fmt: skip
    assert (status, fields["code"]) == (413, "body_too_large")


def test_a_client_that_sends_it_all_the_same_still_gets_the_answer(server: LocalServer) -> None:
    answer = requests.post(f"{server.url}/fake", params=QUERY, data=bytes(32 * 2**20), headers=HEADERS, timeout=WAIT_S)
    assert_contract(answer, 413, "body_too_large")
    with RemoteVAE(server.url.replace("//", f"//:{TOKEN}@") + "/fake") as vae, pytest.raises(BodyTooLarge):
        vae.decode(latents(1, 4, 512, 513))


def test_an_unknown_path_and_an_unknown_model_are_json(server: LocalServer) -> None:
    assert_contract(requests.get(f"{server.url}/a/b/c", headers=HEADERS, timeout=WAIT_S), 404, "unknown_route")
    assert_contract(requests.get(f"{server.url}/nope", headers=HEADERS, timeout=WAIT_S), 404, "unknown_model")


def test_serves_own_timeout_is_json(server: LocalServer) -> None:
    headers = HEADERS | {"x-request-timeout-seconds": "0.2"}
    answer = requests.post(f"{server.url}/slow", params=QUERY, data=BODY, headers=headers, timeout=WAIT_S)
    assert_contract(answer, 504, "deadline_exceeded")


def test_an_ingress_that_dies_answers_json_and_comes_back(server: LocalServer) -> None:
    answers: list[requests.Response] = []

    def decode(path: str) -> None:
        answers.append(requests.post(f"{server.url}/{path}", params=QUERY, data=BODY, headers=HEADERS, timeout=WAIT_S))

    waiting = threading.Thread(target=decode, args=("slow",))
    waiting.start()
    time.sleep(DECODE_S / 2)
    for pid in _pids(server, "Ingress"):
        os.kill(pid, signal.SIGKILL)
    waiting.join()
    assert_contract(answers[0], 503, "unavailable")
    give_up = time.monotonic() + WAIT_S
    while answers[-1].status_code != 200 and time.monotonic() < give_up:
        decode("fake")
        assert answers[-1].status_code == 200 or answers[-1].json()["code"] in ("internal_error", "unavailable")
        time.sleep(0.2)
    assert answers[-1].status_code == 200


GENERATOR = """
import ray
import torch
from remote_vae import RemoteVAE
ray.init("auto", log_to_driver=False)
with RemoteVAE.from_app("fake") as vae:
    print(tuple(vae.decode(torch.zeros(1, 4, 8, 8), output_type="pt").shape))
"""


def test_a_generator_that_joins_its_ray_decodes_by_handle(server: LocalServer) -> None:
    """As the README has it: with Ray's token, and told that this Ray is on loopback alone."""
    environment = {"RAY_ADDRESS": server.ray_address, **LOOPBACK_VARIABLES, **server.ray_environment}
    command = [sys.executable, "-c", GENERATOR]
    said = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert said.stdout == "(1, 3, 64, 64)\n", said.stderr


def test_sigterm_to_the_whole_group_lets_requests_in_flight_finish_and_leaves_nothing(server: LocalServer) -> None:
    """What a supervisor sends, and, as SIGINT, Ctrl-C. The last test of the module."""
    answers: list[int] = []

    def decode() -> None:
        answer = requests.post(f"{server.url}/slow", params=QUERY, data=BODY, headers=HEADERS, timeout=WAIT_S)
        answers.append(answer.status_code)

    waiting = [threading.Thread(target=decode) for _ in range(8)]
    for thread in waiting:
        thread.start()
    time.sleep(DECODE_S / 2)  # one is being decoded, the others wait in the replica
    started = server.processes()
    launcher = server.launched
    os.killpg(launcher.pid, signal.SIGTERM)
    for thread in waiting:
        thread.join()
    assert answers == [200] * 8
    assert launcher.wait(WAIT_S) == 0
    assert not living(started)
    log = server.log.read_text(errors="replace")
    assert "requests in flight have 300 s to finish" in log
    assert "Traceback" not in log[log.index("Stopping: ") :]


def _pids(server: LocalServer, deployment: str) -> list[int]:
    pids = server.processes(f"ServeReplica:remote-vae:{deployment}")
    assert pids
    return pids
