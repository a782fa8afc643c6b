"""The ComfyUI nodes while they wait, and what they say where something does not fit: a bar, a text, the user's Interrupt."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui_itself import ComfyUI, InterruptProcessingException, comfyui
from comfyui_package import Served, Z, load, local_images, nodes, run, running, server
from failing_server import raising, saying
from in_process import InProcess, fake_engine, pipeline_of
from limits import WAIT_S, stretched
from remote_vae import errors
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.http.app import create_app
from samples import latents
from scripted_server import Exchange, ScriptedServer
from served import served
from tiled_model import A_FEW, LARGE, SMALL, TILES, tiled_model

__all__ = ["comfyui", "nodes", "running", "server"]  # fixtures
KNOWN = ModelDescription(
    name="model", state="ready", latent_channels=4, spatial_ratio=8, temporal_ratio=None, video=False
)


class Model(InProcess):
    """A model that says of itself what a test has it say."""

    described = KNOWN

    def describe(self, name: str) -> ModelDescription:
        return self.described


# Interrupt


def interrupt(comfyui: ComfyUI, once: Any) -> list[float]:
    """The user presses it as soon as that is so; when that was."""
    pressed: list[float] = []

    def press() -> None:
        give_up = time.monotonic() + WAIT_S
        while not once() and time.monotonic() < give_up:
            time.sleep(0.01)
        pressed.append(time.monotonic())
        comfyui.interrupted.set()

    threading.Thread(target=press, daemon=True).start()
    return pressed


def test_interrupt_ends_a_decode_within_a_second_and_the_server_drops_it(
    nodes: ModuleType, comfyui: ComfyUI, weights: Path
) -> None:
    with tiled_model(weights) as model, served(create_app(Model(model=model.pipeline.answer), 1 << 20, WAIT_S)) as url:
        alone = model.alone()
        pressed = interrupt(comfyui, lambda: model.began >= 3)
        with pytest.raises(InterruptProcessingException):
            run(nodes, "RemoteVAE_Decode", samples={"samples": LARGE}, url=url, model="model")
        assert time.monotonic() - pressed[0] < stretched(1)
        began = model.began
        assert torch.equal(model.small(), alone)
        assert model.began <= began + A_FEW + TILES[SMALL.shape] < TILES[LARGE.shape]


@pytest.mark.parametrize("node", ["RemoteVAE_Load", "RemoteVAE_Decode", "RemoteVAE_Encode"])
def test_interrupt_ends_the_wait_for_a_server_that_says_nothing(nodes: ModuleType, comfyui: ComfyUI, node: str) -> None:
    asked, go = threading.Event(), threading.Event()

    def silence(exchange: Exchange) -> None:
        asked.set()
        go.wait(WAIT_S)

    inputs: dict[str, Any] = {
        "RemoteVAE_Load": {}, "RemoteVAE_Decode": {"samples": {"samples": SMALL}},
        "RemoteVAE_Encode": {"pixels": torch.zeros(1, 16, 16, 3)},
    }[node]  # fmt: skip
    with ScriptedServer(silence) as there:
        pressed = interrupt(comfyui, asked.is_set)
        with pytest.raises(InterruptProcessingException):
            run(nodes, node, url=there.url, model="(named in the URL)", **inputs)
        assert time.monotonic() - pressed[0] < stretched(1)
        go.set()


def test_interrupt_is_not_taken_for_a_server_that_is_away(nodes: ModuleType, comfyui: ComfyUI) -> None:
    """The fallback is for that."""

    class Fallback:
        def decode(self, *_: object) -> None:
            raise AssertionError

    pipeline = pipeline_of(fake_engine(decode_s=2))
    with served(create_app(Model(model=pipeline.answer), 1 << 20, WAIT_S)) as url:
        vae = load(nodes, url, "model", fallback=Fallback())
        comfyui.interrupted.set()
        with pytest.raises(InterruptProcessingException):
            vae.decode(SMALL)
    pipeline.close()


# What is shown


@pytest.fixture
def slow(nodes: ModuleType) -> Any:
    pipeline = pipeline_of(fake_engine(decode_s=2.5))
    models = Model(model=pipeline.answer)
    with served(create_app(models, 1 << 20, WAIT_S)) as url:
        yield SimpleNamespace(url=url, models=models)
    pipeline.close()


def test_starting_is_shown_with_its_seconds_and_its_reason(nodes: ModuleType, slow: Any, comfyui: ComfyUI) -> None:
    startup = {"began": 1.0e9, "imports_s": 1.0, "weights_s": 4.0}
    slow.models.described = replace(KNOWN, state="starting", reason="waits for 1 GPU", startup=startup)
    run(nodes, "RemoteVAE_Decode", samples={"samples": SMALL}, url=slow.url, model="model")
    assert ("Remote VAE: starting, 2 s of about 8: waits for 1 GPU", "7") in comfyui.texts
    assert len(set(comfyui.texts)) == len(comfyui.texts), "once each"
    assert 0.1 < max(comfyui.bar) < 1


def test_queued_and_decoding_are_shown(nodes: ModuleType, slow: Any, comfyui: ComfyUI) -> None:
    vae = load(nodes, slow.url, "model")
    first = threading.Thread(target=vae.decode, args=(SMALL,))
    first.start()
    time.sleep(0.3)
    vae.decode(SMALL + 1)
    first.join()
    told = [text.removeprefix("Remote VAE: ").split(",")[0] for text, _ in comfyui.texts]
    assert {"queued behind 1", "decoding"} <= set(told)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["comfy.utils", "server", "comfy_execution.utils", "comfy.model_management"])
def test_a_comfyui_without_a_part_of_it_shows_the_rest(
    nodes: ModuleType, slow: Any, comfyui: ComfyUI, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, missing)
    run(nodes, "RemoteVAE_Decode", samples={"samples": SMALL}, url=slow.url, model="model")
    assert bool(comfyui.bar) == (missing != "comfy.utils")
    assert bool(comfyui.texts) == (missing != "server")
    assert bool(comfyui.asked) == (missing != "comfy.model_management")
    if missing == "comfy_execution.utils":  # before 0.3.51
        assert {node for _, node in comfyui.texts} == {"4"}


# The list of models, and the address


@pytest.mark.parametrize(
    ("answer", "token", "entry"),
    [
        (raising(errors.Unauthorized("no")), None, "(the server at {} asks for a token: set REMOTE_VAE_TOKEN)"),
        (raising(errors.Unauthorized("no")), "one", "(the server at {} does not take the token of REMOTE_VAE_TOKEN)"),
        (saying(200, b'{"models": []}'), None, "(the server at {} has no models)"),
        (saying(200, b"<html>"), None, "({} did not describe itself; is it the URL of a remote-vae server?)"),
    ],
)
def test_the_list_says_why_it_is_empty_and_so_does_the_log(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Any, token: str | None,
    entry: str,
) -> None:  # fmt: skip
    with ScriptedServer(answer) as there:
        url = there.url.removesuffix("/model")
        monkeypatch.setenv("REMOTE_VAE_URL", url)
        monkeypatch.delenv("REMOTE_VAE_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("REMOTE_VAE_TOKEN", token)
        node = nodes.NODE_CLASS_MAPPINGS["RemoteVAE_Load"]
        listed = node.INPUT_TYPES()["required"]["model"]
        assert listed[0] == [entry.format(url), "(named in the URL)"]
        assert listed[1]["default"] == listed[0][0]
        assert listed[0][0][1:-1] in caplog.text
        with pytest.raises(errors.BadRequest, match="No model is chosen"):
            run(nodes, "RemoteVAE_Load", url=url, model=listed[0][0])
        assert "one" not in caplog.text.replace("None", "")


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/sd", "{}/sd/", "{}/flux", " {} ", "without scheme"])
def test_an_address_is_understood_as_people_write_it(
    nodes: ModuleType, server: str, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    url = server.removeprefix("http://") if written == "without scheme" else written.format(server)
    monkeypatch.setenv("REMOTE_VAE_URL", url)
    node = nodes.NODE_CLASS_MAPPINGS["RemoteVAE_Load"]
    listed = node.INPUT_TYPES()["required"]
    assert "sd" in listed["model"][0]
    vae = run(nodes, "RemoteVAE_Load", url=url, model="sd")
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"]))
    assert run(nodes, "RemoteVAE_Load", url=listed["url"][1]["default"], model="sd").latent_channels == 4


# What does not fit


@pytest.mark.parametrize(
    ("kind", "z", "fits"),
    [
        ("sd", Z["flux"], "16 channels, of images: flux"),
        ("flux", Z["sd"], "4 channels, of images: sd, tiny"),
        ("hunyuan", Z["sd"], "4 channels, of images: sd, tiny"),
        ("flux", Z["hunyuan"], "4 channels, of a video: hunyuan"),
        ("sd", latents(1, 7, 4, 4), "7 channels, of images: no model that this server has had awake"),
    ],
)
def test_a_misfit_says_which_models_would_fit(
    nodes: ModuleType, server: str, running: Served, kind: str, z: torch.Tensor, fits: str
) -> None:
    vae = load(nodes, server, kind)
    with pytest.raises(errors.BadRequest) as raised:
        vae.decode(z)
    assert raised.value.message.endswith(fits)
    assert "\n" not in raised.value.message


def test_frames_of_a_video_at_an_image_model_are_told_where_the_channels_fit_by_chance(
    nodes: ModuleType, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae = load(nodes, server, "sd")
    with caplog.at_level(logging.WARNING):
        vae.decode(Z["hunyuan"][:, :, :1])
        assert not caplog.text
        vae.decode(Z["hunyuan"])
    assert "Latents of 3 frames go to a model for images" in caplog.text
