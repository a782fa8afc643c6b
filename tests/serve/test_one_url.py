"""One URL under HAProxy, `/<model>`: awake the model's replica answers there, asleep the ingress, and nobody can tell which.

The wire cases and the client cells go both ways: to HAProxy, and to Serve's fallback proxy, as HAProxy sends them while a model
has no replica. That models fall asleep and wake meanwhile: `benchmarks/asleep.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from test_clients_and_models import check_cell
from test_wire_cases_on_serve import CHOSEN

from client_cells import CELLS, KINDS, Kind, model
from haproxy_binary import why_no_haproxy
from limits import WAIT_S
from local_server import LocalServer, free_port
from remote_vae import RemoteVAE
from remote_vae.errors import Unauthorized
from samples import latents, save_tiny_vae
from wire_case import WireCase
from wire_cases import CASES

pytestmark = pytest.mark.slow
TOKEN = "s3cret-of-the-test"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
PAGE = "https://page.example"
WIRED = ("sd", "sdxl", "flux", "hunyuan")
FROM_ZERO = {
    "min_replicas": 0, "max_replicas": 1, "target_ongoing_requests": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1,
    "upscale_delay_s": 1, "downscale_delay_s": 1, "downscale_to_zero_delay_s": 0,
    "policy": {"policy_function": "remote_vae_serve.scaling:YieldWhenIdle", "policy_kwargs": {"idle_s": 2}},
}  # fmt: skip
QUERY = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}
BODY = latents(1, 4, 8, 8).numpy().tobytes()


def application(name: str, deployment: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    return {
        "name": name, "route_prefix": None, "import_path": "remote_vae_serve.app:vae", "args": {"num_cpus": 0, **args},
        "deployments": [{"name": "VAE", **(deployment or {"num_replicas": 1})}],
    }  # fmt: skip


@dataclass
class OneURL:
    """The server.

    Attributes:
        asleep: where HAProxy sends what is for a model without a replica.
    """

    server: LocalServer
    asleep: str
    folder: Path

    @property
    def url(self) -> str:
        return self.server.url

    def post(self, path: str, **more: Any) -> requests.Response:
        given = {"params": QUERY, "data": BODY, "headers": HEADERS, "timeout": WAIT_S} | more
        return requests.post(self.url + path, **given)

    def get(self, path: str) -> dict[str, Any]:
        answer = requests.get(self.url + path, headers=HEADERS, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_until(self, name: str, state: str) -> dict[str, Any]:
        """Its description then, by asking as often as it can: that is not to keep a model awake."""
        give_up = time.monotonic() + WAIT_S
        while (said := self.get(f"/{name}"))["state"] != state:
            assert time.monotonic() < give_up, said
            time.sleep(0.02)
        return said


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneURL]:
    if (reason := why_no_haproxy()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("weights")
    exact: dict[str, Any] = {"device": "cpu", "engine": "eager", "dtype": "float32", "threads": 1, "batching": "off"}
    models = [application(kind, source=str(save_tiny_vae(kind, folder / kind)), **exact) for kind in WIRED]
    for name in {kind.model for kind in KINDS}:
        model(name).save_pretrained(folder / f"cell-{name}")
        models.append(application(f"cell-{name}", source=str(folder / f"cell-{name}"), **exact))
    zero = {"autoscaling_config": FROM_ZERO}
    models.append(application("sleeper", zero, source=str(folder / "sd"), **exact))
    models.append(application("broken", zero, source="nowhere", subfolder="vae"))

    def change(config: dict[str, Any]) -> None:
        ingress = next(app for app in config["applications"] if app["name"] == "remote-vae")
        ingress["args"] = {"max_body_mib": 8, "request_timeout_s": 60, "allow_origins": [PAGE]}
        config["applications"] = [ingress, *models]

    port = free_port()
    environment = {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port), "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = (sys.executable, "-m", "remote_vae_serve.cli", "run", "--token", TOKEN)
    names = tuple(app["name"] for app in models if app["name"] not in ("sleeper", "broken"))
    with LocalServer(models=names, change=change, command=command, token=TOKEN, environment=environment) as server:
        yield OneURL(server, f"http://127.0.0.1:{port}", folder)


@pytest.mark.parametrize("side", ["awake", "asleep"])
@pytest.mark.parametrize("name", CHOSEN)
def test_every_client_gets_what_it_is_owed_on_either_side(one: OneURL, name: str, side: str) -> None:
    case = CASES[name]
    answer = send(one.url if side == "awake" else one.asleep, case)
    case.gives.check(answer, case.answered_by)
    number = answer.headers["x-request-id"]
    assert number == case.sent.headers.get("x-request-id", number)
    assert "," not in number


def send(url: str, case: WireCase) -> requests.Response:
    with requests.Session() as session:
        session.headers.clear()  # nothing but what the client sends, and the token
        headers = dict(case.sent.headers) | HEADERS
        request = requests.Request(
            case.method, url + case.path, headers, data=case.sent.body, params=list(case.sent.query)
        )
        return session.send(session.prepare_request(request), allow_redirects=False, timeout=WAIT_S)


@pytest.mark.parametrize("side", ["awake", "asleep"])
@pytest.mark.parametrize(("client", "kind"), CELLS, ids=[f"{client} x {kind.name}" for client, kind in CELLS])
def test_every_cell_of_the_table_of_clients_is_the_same(
    one: OneURL, client: str, kind: Kind, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = one.url if side == "awake" else one.asleep
    if client == "a script with `urllib`":  # which sends no token that stands in a URL
        opener = urllib.request.build_opener()
        opener.addheaders = list(HEADERS.items())
        monkeypatch.setattr(urllib.request, "_opener", opener)
    else:
        url = url.replace("//", f"//:{TOKEN}@")
    check_cell(f"{url}/cell-{kind.model}", client, kind)


def test_reading_wakes_nobody_and_keeps_nobody_awake_and_says_the_same(one: OneURL) -> None:
    one.wait_until("sleeper", "cold")
    assert one.server.processes("ServeReplica:sleeper") == []
    assert one.post("/sleeper").status_code == 200
    awake = one.wait_until("sleeper", "ready")
    began = time.monotonic()
    asleep = one.wait_until("sleeper", "cold")  # under GETs as fast as they go
    assert time.monotonic() - began < WAIT_S / 2
    for of_a_replica in ("gpu_ids", "state", "replicas"):
        awake.pop(of_a_replica, None)
        asleep.pop(of_a_replica, None)
    assert asleep == awake


def test_the_request_that_wakes_a_model_is_answered_as_every_other(one: OneURL) -> None:
    one.wait_until("sleeper", "cold")
    with ThreadPoolExecutor(8) as pool:
        first = [answer.result() for answer in [pool.submit(one.post, "/sleeper") for _ in range(8)]]
    later = one.post("/sleeper")
    assert {answer.status_code for answer in first} == {200}
    assert {answer.content for answer in first} == {later.content}
    assert {key for answer in first for key in answer.headers if key.startswith("x-")} >= {
        key for key in later.headers if key.startswith("x-")
    }


def test_what_is_wrong_is_refused_without_waking_it(one: OneURL) -> None:
    asleep = one.wait_until("sleeper", "cold")
    answers = [
        one.post("/sleeper", params=QUERY | {"dtype": "int3"}), one.post("/sleeper", data=b"short"),
        one.post("/sleeper", data=bytes(8 * 2**20 + 1)), one.post("/sleeper", headers={}),
        requests.get(f"{one.url}/sleeper/decode", headers=HEADERS, timeout=WAIT_S), one.post("/sleeper/nothing"),
    ]  # fmt: skip
    codes = ["bad_request", "bad_request", "body_too_large", "unauthorized", "wrong_method", "unknown_route"]
    assert [answer.json()["code"] for answer in answers] == codes
    # For up to a second the other ingress may not have heard yet that it sleeps. Had it been woken, another start would be told.
    assert one.wait_until("sleeper", "cold").get("startup") == asleep.get("startup")
    with RemoteVAE(f"{one.url}/sleeper") as vae, pytest.raises(Unauthorized):
        vae.describe()


def test_a_page_that_is_allowed_is_served_on_either_side_and_reads_what_is_wrong(one: OneURL) -> None:
    page = {"origin": PAGE}
    asked = page | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    asleep = one.wait_until("sleeper", "cold")
    for path in ("/sd", "/sleeper", "/models"):
        preflight = requests.options(one.url + path, headers=asked, timeout=WAIT_S)
        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "authorization")
        assert preflight.headers["access-control-allow-origin"] == PAGE
        foreign = requests.options(one.url + path, headers=asked | {"origin": "null"}, timeout=WAIT_S)
        assert foreign.status_code == 401
        assert "access-control-allow-origin" not in foreign.headers
    answers = [
        (one.post("/sleeper", headers=page), 401), (one.post("/sleeper", headers=HEADERS | page, data=b"short"), 400),
        (one.post("/sd", headers=HEADERS | page), 200), (one.post("/sd", headers=page), 401),
        (one.post("/sd", headers=HEADERS | page, data=bytes(8 * 2**20 + 1)), 413),
    ]  # fmt: skip
    assert one.wait_until("sleeper", "cold").get("startup") == asleep.get("startup")  # it was not woken
    for answer, status in [*answers, (one.post("/sleeper", headers=HEADERS | page), 200)]:
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE), answer.text
        assert (answer.headers["access-control-expose-headers"], answer.headers["vary"]) == ("*", "Origin")


def test_a_deadline_holds_while_it_starts(one: OneURL) -> None:
    one.wait_until("sleeper", "cold")
    answer = one.post("/sleeper", headers=HEADERS | {"x-vae-deadline-ms": "200"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")


def test_a_model_that_cannot_be_loaded_says_why_on_either_side(one: OneURL) -> None:
    said = []
    for _ in range(2):
        answer = one.post("/broken")
        assert (answer.status_code, answer.json()["code"]) == (503, "model_failed"), answer.text
        assert int(answer.headers["retry-after"]) > 0
        said.append(answer.json()["error"])
    assert one.wait_until("broken", "failed")["reason"] in said[0]


def test_models_come_and_go_by_deploy_and_the_others_keep_their_paths_and_processes(one: OneURL) -> None:
    changed = one.folder / "changed.yaml"
    config = one.server.configuration()
    config["applications"].append(application("more", source=str(one.folder / "sd"), device="cpu"))
    changed.write_text(yaml.safe_dump(config))
    before = one.server.processes("ServeReplica:sd:")
    assert before
    deploy = [sys.executable, "-m", "remote_vae_serve.cli", "deploy", "--address", one.server.dashboard, str(changed)]
    environment = os.environ | one.server.ray_environment
    told = subprocess.run(deploy, capture_output=True, text=True, env=environment, timeout=WAIT_S, check=False)
    assert told.returncode == 0, told.stderr
    assert "a path of its own" in told.stdout
    give_up = time.monotonic() + WAIT_S
    while (answer := one.post("/more")).status_code != 200:
        assert time.monotonic() < give_up, answer.text
        time.sleep(0.2)
    while requests.get(f"{one.url}/more/health", headers=HEADERS, timeout=WAIT_S).status_code != 200:
        assert time.monotonic() < give_up, "the replica does not answer there itself: the ingress knows no such path"
        time.sleep(0.2)
    assert one.server.processes("ServeReplica:sd:") == before
