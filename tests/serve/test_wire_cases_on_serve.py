"""Of the wire cases, those that a proxy, a handle or another process could spoil: through real Serve, pixels included."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from limits import WAIT_S
from running_cluster import Cluster
from wire_case import WireCase
from wire_cases import CASES

CHOSEN = (
    "v0 blog, latents as the pipeline left them",
    "SD.Next v0 week, Flux packed",
    "v1 helper base64, JPEG back",
    "v1 helper base64, tensor back",
    "v1 helper binary, tensor back",
    "v1 helper base64, mp4 back",
    "today's helper at /sd/decode/",
    "today's helper with bfloat16",
    "today's helper with both",
    "today's helper, png, sdxl",
    "today's helper with a processor, a video",
    "today's helper, pt with partial_postprocess, a video",
    "SD.Next raw, Flux packed",
    "ComfyUI video (5-D with wrong height and width)",
    "sampler grid",
    "urllib, shape last",
    "curl without a Content-Type",
    "curl GET /sd/",
    "curl GET /openapi.json",
    "diffusers remote_encode PNG with a factor",
    "diffusers remote_encode tensor, one URL",
    "ours, the model's own scaling of a video",
    "ours with a deadline that is met",
    "x-vae-deadline-ms: soon",
    "curl --data-binary with the type that it adds by itself",
    "a body of a byte too few",
    "latents of Flux for SD",
    "a model that is not here",
    "PUT /sd",
    "a client that numbers its requests",
    "a client that numbers its requests, and is refused",
)


def send(cluster: Cluster, case: WireCase) -> Any:
    with requests.Session() as session:
        session.headers.clear()  # nothing but what the client sends
        request = requests.Request(
            case.method, cluster.url + case.path, case.sent.headers, data=case.sent.body, params=list(case.sent.query)
        )
        return session.send(session.prepare_request(request), allow_redirects=False, timeout=WAIT_S)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_client_gets_through_serve_what_it_is_owed(cluster: Cluster, name: str) -> None:
    case = CASES[name]
    answer = send(cluster, case)
    case.gives.check(answer, case.answered_by)
    number = answer.headers["x-request-id"]
    assert number
    assert "," not in number  # once, though the proxy writes it as well
    assert number == case.sent.headers.get("x-request-id", number)
