"""A real browser plays our mp4 from the first frame to the last, and a page of another origin decodes where that is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser import Site, needs_browser
from in_process import InProcess, fake_engine, pipeline_of
from js_client import MODULE
from reading import frames
from remote_vae.protocol.request import Request
from remote_vae.protocol.result import Result
from remote_vae_serve.codecs.mp4 import to_mp4
from remote_vae_serve.http.app import create_app
from remote_vae_serve.middleware import settings
from remote_vae_serve.proxy import middlewares
from served import served

pytestmark = [pytest.mark.browser, needs_browser]
PLAYER = b"""<video id=v muted autoplay src="/video.mp4"></video><script>
const v = document.getElementById("v");
const say = (said) => fetch("/said", {method: "POST", body: JSON.stringify(said)});
v.onerror = () => say({error: v.error.message});
v.onended = () => say({width: v.videoWidth, height: v.videoHeight, seconds: v.duration,
    frames: v.getVideoPlaybackQuality().totalVideoFrames});
</script>"""
PAGE = b"""<script type=module>
import { RemoteVAE, Tensor, listModels } from "/remote_vae.js";
const { open, closed } = await (await fetch("/servers.json")).json();
const latents = Tensor.fromFloat32(new Float32Array(4 * 8 * 8), [1, 4, 8, 8]);
const told = (error) => ({ type: error.type, status: error.status, parameter: error.parameter, hasId: Boolean(error.requestId) });
async function tried(call) {
  try {
    return await call();
  } catch (error) {
    return error.type ? told(error) : String(error);
  }
}
const vae = new RemoteVAE(`${open}/fake`, { token: "first", retries: 0 });
const stranger = new RemoteVAE(`${closed}/fake`, { retries: 0 });
const said = {
  picture: await tried(async () => {
    const picture = await createImageBitmap(await vae.decode(latents, { imageFormat: "png" }));
    return [picture.width, picture.height];
  }),
  tensor: await tried(async () => (await vae.decode(latents, { outputType: "pt", partialPostprocess: true })).shape),
  latents: await tried(async () => (await vae.encode(new Tensor(new Uint8Array(64 * 64 * 3), [64, 64, 3]))).shape),
  models: await tried(async () => (await listModels(open, { token: "first" })).map(({ name }) => name)),
  wrong: await tried(() => vae.decode(new Tensor(new Float32Array(7), [1, 7, 1, 1]))),
  unauthorized: await tried(() => new RemoteVAE(`${open}/fake`, { retries: 0 }).decode(latents)),
  tooLarge: await tried(() => vae.decode(new Tensor(new Float32Array(2 ** 20), [2 ** 20]))),
  refused: await tried(() => stranger.decode(latents)),
  described: await tried(() => stranger.describe()),
};
// What needs no preflight: the browser sends it, whatever comes back.
const simple = `${closed}/fake?shape=1&shape=4&shape=8&shape=8&dtype=float16`;
await fetch(simple, { method: "POST", mode: "no-cors", body: latents.data });
await fetch("/said", { method: "POST", body: JSON.stringify(said) });
</script>"""


def test_a_browser_plays_it_to_the_end(tmp_path: Path) -> None:
    mp4 = to_mp4([frames(12, 48, 64)], (12, 48, 64, 3), 8)
    with Site({"/": (PLAYER, "text/html"), "/video.mp4": (mp4, "video/mp4")}) as site:
        assert json.loads(site.opened(tmp_path)) == {"width": 64, "height": 48, "seconds": 1.5, "frames": 12}


@contextmanager
def server(decoded: list[Request], monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[str]:
    """The HTTP app in the layers that this environment asks for; `decoded` are the requests that reached the model."""
    pipeline = pipeline_of(fake_engine(), "fake")

    async def answer(request: Request) -> Result:
        decoded.append(request)
        return await pipeline.answer(request)

    with monkeypatch.context() as here:
        for name, value in environment.items():
            here.setenv(name, value)
        app: Any = create_app(InProcess(fake=answer), 2**20, 60.0)
        for layer in middlewares():
            app = layer.cls(app, *layer.args, **layer.kwargs)
    with served(app) as url:
        yield url
    pipeline.close()


def test_a_page_of_another_origin_decodes_where_it_is_allowed_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    not_asked: list[Request] = []
    files = {"/": (PAGE, "text/html"), "/remote_vae.js": (MODULE.read_bytes(), "text/javascript")}
    with (
        Site(files) as site,
        server(asked, monkeypatch, **{settings.TOKENS: "first", settings.ALLOW_ORIGINS: site.origin}) as open_url,
        server(not_asked, monkeypatch) as closed_url,
    ):
        servers = json.dumps({"open": open_url, "closed": closed_url}).encode()
        site.files["/servers.json"] = (servers, "application/json")
        said = json.loads(site.opened(tmp_path))
    unreadable = {"type": "connection_failed", "status": None, "parameter": None, "hasId": False}
    assert said == {
        "picture": [64, 64],
        "tensor": [1, 64, 64, 3],
        "latents": [1, 4, 8, 8],
        "models": ["fake"],
        "wrong": {"type": "bad_request", "status": 400, "parameter": "shape", "hasId": True},
        "unauthorized": {"type": "unauthorized", "status": 401, "parameter": None, "hasId": True},
        "tooLarge": {"type": "body_too_large", "status": 413, "parameter": "body", "hasId": True},
        "refused": unreadable,
        "described": unreadable,
    }
    assert [request.verb for request in asked] == ["decode", "decode", "encode", "decode"]
    assert not_asked == []
