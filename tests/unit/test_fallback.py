"""A local autoencoder for when all else fails: when it is asked, and that it gives what the server would have given."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from failing_server import Z, cut, decode, hang_up, in_turn, no_http, raising, saying, skip_sleeps
from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae import AsyncRemoteVAE, RemoteVAE, errors, remote_decode, remote_encode
from remote_vae.errors import BadRequest, Unavailable
from remote_vae_serve.http.app import create_app
from samples import KINDS, latents, samples_of, tiny_vae
from served import served


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return skip_sleeps(monkeypatch)


FAILURES = {
    "503": saying(503), "starting": raising(errors.ModelStarting("Wait.")), "failed": raising(errors.ModelFailed("Gone.")),
    "429": saying(429), "500": saying(500), "protocol": raising(errors.ProtocolMismatch("Other.")), "502": saying(502),
    "504": saying(504), "cut": cut, "hang up": hang_up, "no http": no_http, "page": saying(200, b"<html>"),
    "silent": lambda exchange: time.sleep(0.4),
}  # fmt: skip
THE_USERS = {
    "400": BadRequest, "401": errors.Unauthorized, "404": errors.UnknownModel, "405": errors.WrongMethod,
    "413": errors.BodyTooLarge, "415": errors.UnknownContentType,
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_whatever_fails_in_the_server_the_fallback_makes_good(
    slept: list[float], failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    z = latents(1, 4, 2, 2)
    vae = tiny_vae("tiny")
    timeout = 0.2 if failure == "silent" else 5
    with in_turn(FAILURES[failure]) as server:
        decoded = decode(server.url, z, fallback=vae, retries=1, timeout=timeout)
        assert len(server.requests) in (1, 2)
    assert torch.equal(decoded, vae.decode(z).sample)
    assert "local fallback" in caplog.text


def test_a_server_that_is_not_there_is_made_good_and_so_is_one_past_the_deadline(slept: list[float]) -> None:
    vae = tiny_vae("tiny")
    decode("http://127.0.0.1:1/model", fallback=vae)
    assert len(slept) == 3
    with in_turn(lambda exchange: time.sleep(0.3)) as server:
        decode(server.url, fallback=vae, deadline=0.1, timeout=60)


def test_an_async_client_falls_back_too_and_not_in_the_loop() -> None:
    vae = tiny_vae("tiny")
    threads = []
    vae.decode, whole = lambda *z, **options: threads.append(threading.get_ident()) or whole(*z, **options), vae.decode

    async def run(url: str) -> Any:
        async with AsyncRemoteVAE(url, fallback=vae, retries=0) as client:
            return threading.get_ident(), await client.decode(Z, output_type="pt")

    with in_turn(saying(500)) as server:
        loops, decoded = asyncio.run(run(server.url))
    assert torch.equal(decoded, whole(Z).sample)
    assert loops not in threads


@pytest.mark.parametrize("status", THE_USERS)
def test_what_is_wrong_with_a_request_is_never_made_good(status: str) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    vae = SimpleNamespace(decode=never, encode=never, config={})
    with in_turn(raising(THE_USERS[status]("No."))) as server:
        with pytest.raises(THE_USERS[status]):
            decode(server.url, fallback=vae)
        with pytest.raises(THE_USERS[status]):
            remote_encode(server.url, np.zeros((1, 3, 8, 8), np.float32), fallback=vae)


@pytest.mark.parametrize("fallback", ["sd", 3, object(), torch.nn.Linear(1, 1)], ids=lambda f: type(f).__name__)
def test_a_fallback_that_is_no_autoencoder_is_refused(fallback: Any) -> None:
    with pytest.raises(BadRequest, match="fallback is a") as caught:
        RemoteVAE("http://127.0.0.1:1/model", fallback=fallback)
    assert caught.value.parameter == "fallback"


def test_where_the_fallback_fails_too_it_is_the_servers_error_that_is_raised() -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    vae = tiny_vae("tiny")
    vae.decode = no_memory
    with in_turn(saying(500)) as server, pytest.raises(errors.InternalError) as caught:
        decode(server.url, fallback=vae)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_an_mp4_is_the_servers_alone() -> None:
    with in_turn(saying(503)) as server, pytest.raises(Unavailable):
        decode(server.url, latents(1, 4, 3, 4, 6), output_type="mp4", fallback=tiny_vae("hunyuan"), retries=0)


HINTS: dict[str, Any] = {
    "num_frames": 9, "layers": 2, "drop_frames": 0, "layout": "frames_first", "patch_order": "ph_pw_c", "sigma_data": 0.5,
    "decode_timestep": 0.05, "decode_noise_scale": 0.0, "decode_chunk_size": 8, "force_not_quantize": False,
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_that_the_fallback_cannot_keep_is_refused_and_not_lost(name: str) -> None:
    vae = tiny_vae("sd")
    pixels = np.zeros((1, 3, 8, 8), np.float32)
    with in_turn(saying(500, b"broken")) as server:
        with pytest.raises(BadRequest, match=f"cannot keep {name} .*the server said: .*broken") as caught:
            decode(server.url, latents(1, 4, 2, 2), fallback=vae, **{name: HINTS[name]})
        assert caught.value.parameter == name
        assert isinstance(caught.value.__cause__, errors.InternalError)
        with pytest.raises(BadRequest, match=f"cannot keep {name} "):
            remote_encode(server.url, pixels, fallback=vae, **{name: HINTS[name]})


def test_denormalized_latents_are_those_of_the_decoder_for_the_fallback_too() -> None:
    vae, z = tiny_vae("flux"), latents(1, 16, 2, 2)
    with in_turn(saying(500)) as server, torch.no_grad():
        for said, ready in ((True, z), (False, z / vae.config.scaling_factor + vae.config.shift_factor)):
            assert torch.equal(decode(server.url, z, fallback=vae, denormalized=said), vae.decode(ready).sample)
        given = decode(server.url, z, fallback=vae, denormalized=True, scaling_factor=0.5)
        assert torch.equal(given, vae.decode(z / 0.5).sample)


def half_a_picture(media_type: str) -> bytes:
    file = io.BytesIO()
    photo(24, 16).save(file, media_type.removeprefix("image/"))
    return file.getvalue()[: file.tell() // 2]


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg"])
def test_a_picture_that_cannot_be_read_is_made_good_as_any_broken_reply(
    slept: list[float], media_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae, z = tiny_vae("sd"), latents(2, 4, 2, 2)
    options: dict[str, Any] = {
        "output_type": "pil",
        "image_format": media_type.removeprefix("image/").replace("jpeg", "jpg"),
    }

    async def run(url: str) -> Any:
        async with AsyncRemoteVAE(url, fallback=vae) as client:
            return await client.decode(z, **options)

    with in_turn(saying(500)) as gone:
        expected = decode(gone.url, z, fallback=vae, retries=0, **options)
    with in_turn(saying(200, half_a_picture(media_type), content_type=media_type)) as server:
        assert the_same(decode(server.url, z, fallback=vae, **options), expected)
        assert the_same(asyncio.run(run(server.url)), expected)
        with pytest.raises(errors.BrokenReply, match="no readable image"):
            decode(server.url, z, **options)
    assert len(server.requests) == 3 * len(z)
    assert "no readable image" in caplog.text
    assert not slept


def test_what_a_server_refuses_the_fallback_refuses() -> None:
    vae = tiny_vae("sd")
    wrong: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (latents(1, 4, 3, 2, 2), {"output_type": "pil"}),
        (latents(2, 4, 3, 2, 2), {"partial_postprocess": True}),
        (latents(2, 4, 3, 2, 2), {"output_type": "pil", "processor": VideoProcessor()}),
        (torch.full((1, 4, 2, 2), float("nan")), {}),
        (latents(1, 6, 16), {"height": 100, "width": 100}),
        (latents(1, 6, 16), {"height": 100}),
    ]
    with in_turn(saying(503)) as server:
        for z, options in wrong:
            with pytest.raises(BadRequest):
                decode(server.url, z, fallback=vae, retries=0, **options)
        for image in (
            np.zeros((1, 3, 12, 8), np.float32), np.full((1, 3, 8, 8), np.nan, np.float32), b"no picture",
            np.zeros((4, 8, 3), np.uint8),
        ):  # fmt: skip
            with pytest.raises(BadRequest):
                remote_encode(server.url, image, fallback=vae, retries=0)
        with pytest.raises(BadRequest, match="distribution"):
            remote_encode(server.url, np.zeros((1, 3, 8, 8), np.float32), sample_mode="moments",
                          fallback=tiny_vae("tiny"), retries=0)  # fmt: skip


@pytest.fixture(scope="module")
def running(weights: Path) -> Iterator[str]:
    """A real engine for each kind, behind HTTP."""
    pipelines = {kind: pipeline_of(diffusers_engine(weights / kind), kind) for kind in KINDS}
    models = InProcess(**{kind: pipeline.answer for kind, pipeline in pipelines.items()})
    with served(create_app(models, 1 << 24, 60)) as url:
        yield url
    for pipeline in pipelines.values():
        pipeline.close()


@pytest.fixture(scope="module")
def gone() -> Iterator[str]:
    """A server that is none."""
    with in_turn(saying(500)) as server:
        yield server.url


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    return {kind: tiny_vae(kind) for kind in KINDS}


OUTPUTS: dict[str, dict[str, Any]] = {
    "png": {"output_type": "pil", "image_format": "png"},
    "pt": {"output_type": "pt"},
    "uint8": {"output_type": "pt", "partial_postprocess": True, "return_type": "pt"},
    "processor": {"output_type": "pil", "processor": VideoProcessor()},
    "post-processed": {"output_type": "pt", "processor": VaeImageProcessor()},
}
SCALINGS: dict[str, dict[str, Any]] = {
    "own": {},
    "none": {"do_scaling": False},
    "factors": {"scaling_factor": 0.7, "shift_factor": -0.3},
    "shift": {"shift_factor": 0.25},
}


def the_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(the_same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    return ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_gives_what_the_server_gives(
    running: str, gone: str, vaes: dict[str, Any], kind: str, output: str
) -> None:
    for layout, (z, sizes) in samples_of(kind, batch=2 if output != "post-processed" else 1).items():
        video = layout in ("video", "frames")
        if video and output in ("png", "post-processed"):
            continue
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if output == "pt" else (torch.float16,):
            arguments = {**OUTPUTS[output], **sizes}
            theirs = remote_decode(f"{running}/{kind}", z.to(dtype), **arguments)
            ours = remote_decode(gone, z.to(dtype), fallback=vaes[kind], retries=0, **arguments)
            assert the_same(ours, theirs), (layout, dtype)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_scales_as_the_server_does(
    running: str, gone: str, vaes: dict[str, Any], kind: str, scaling: str
) -> None:
    z, sizes = list(samples_of(kind).values())[-1]
    arguments = {"output_type": "pt", **SCALINGS[scaling], **sizes}
    theirs = remote_decode(f"{running}/{kind}", z, **arguments)
    assert torch.equal(remote_decode(gone, z, fallback=vaes[kind], retries=0, **arguments), theirs)


HINTED: dict[str, tuple[str, torch.Tensor, dict[str, Any]]] = {
    "denormalized": ("flux", latents(1, 16, 4, 6), {"denormalized": True}),
    "seed": ("flux", latents(1, 16, 4, 6), {"seed": 3}),
    "patch_order": ("flux", latents(1, 24, 64), {"patch_order": "ph_pw_c", "height": 64, "width": 96}),
    "layout of a picture": ("flux", latents(1, 1, 4, 6, 16), {"layout": "channels_last"}),
    "layout": ("hunyuan", latents(1, 3, 4, 6, 4), {"layout": "channels_last"}),
    "drop_frames": ("hunyuan", latents(1, 4, 3, 4, 6), {"drop_frames": 1}),
}  # fmt: skip


@pytest.mark.parametrize("hint", HINTED)
def test_the_fallback_keeps_a_hint_as_the_server_does(running: str, gone: str, vaes: dict[str, Any], hint: str) -> None:
    kind, z, said = HINTED[hint]
    theirs = remote_decode(f"{running}/{kind}", z, output_type="pt", **said)
    ours = remote_decode(gone, z, output_type="pt", fallback=vaes[kind], retries=0, **said)
    assert the_same(ours, theirs)


@pytest.mark.parametrize(
    "said", [{"denormalized": True}, {"layout": "channels_last"}, {"layout": "channels_first"}], ids=str
)
@pytest.mark.parametrize("kind", ["flux", "hunyuan"])
def test_the_fallback_encodes_by_a_hint_as_the_server_does(
    running: str, gone: str, vaes: dict[str, Any], kind: str, said: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"do_scaling": True, "sample_mode": "argmax", **said}
    theirs = remote_encode(f"{running}/{kind}", IMAGES["videos"], **arguments)
    ours = remote_encode(gone, IMAGES["videos"], fallback=vaes[kind], retries=0, **arguments)
    assert np.array_equal(ours, theirs)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(25, 18).save(file, "JPEG", exif=exif)
    return file.getvalue()


def grey_of_16_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (16, 24), np.uint16)).save(file, "PNG")
    return file.getvalue()


PIXELS = np.random.default_rng(2).uniform(-1, 1, (2, 3, 5, 16, 24)).astype(np.float32)
IMAGES: dict[str, Any] = {
    "picture": photo(27, 18), "turned": turned_jpeg(), "16 bits": grey_of_16_bits(),
    "uint8": np.asarray(photo(24, 17)), "frames of uint8": np.stack([np.asarray(photo(24, 16, n)) for n in range(5)]),
    "images": PIXELS[:, :, 0], "image": PIXELS[0, :, 0], "videos": PIXELS,
}  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_encodes_as_the_server_does(
    running: str, gone: str, vaes: dict[str, Any], kind: str, image: str
) -> None:
    modes = ("sample", "argmax") if kind == "tiny" else ("sample", "argmax", "moments")
    for mode in modes:
        for do_scaling in {False, mode != "moments"}:
            arguments: dict[str, Any] = {"sample_mode": mode, "seed": 7, "do_scaling": do_scaling}
            theirs = remote_encode(f"{running}/{kind}", IMAGES[image], **arguments)
            ours = remote_encode(gone, IMAGES[image], fallback=vaes[kind], retries=0, **arguments)
            assert np.array_equal(ours, theirs), (mode, do_scaling)
