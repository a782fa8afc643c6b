"""An encode keeps to the budget as a decode does: at once, one by one, in tiles or not at all. What it gives is diffusers'."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fresh_process import printed_by
from in_process import InProcess
from one_model import OneModel
from remote_vae import remote_encode
from remote_vae.errors import BadRequest, Unavailable
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.tiling import ONE_BY_ONE, UNTILED, TilingPlan, view
from remote_vae_serve.http.app import create_app
from samples import latents, save_tiny_vae, tiny_vae
from served import served

TILED = TilingPlan(256)
LARGE = (1, 3, 320, 288)
PEAK = Path("/proc/self/clear_refs")
OF_PICTURES = """
import json
from pathlib import Path
import numpy as np
from hostile_pictures import png_claiming
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.families.table import latent_space_of
from remote_vae_serve.processing.preprocess import prepare
from samples import CONFIGS, KL
space = latent_space_of("AutoencoderKL", {**KL, **CONFIGS["sd"]})
def mib(what):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024
def taken(image):
    Path("/proc/self/clear_refs").write_text("5")  # forget how much it was at most
    before = mib("VmRSS")
    pixels = prepare(EncodeRequest(image), space).pixels
    return (mib("VmHWM") - before) / (pixels.nbytes / 2**20)
def png(mode, size, samples):
    return np.frombuffer(png_claiming(size, size, mode=mode, rows=bytes((samples * size + 1) * size)), np.uint8)
taken(png(2, 64, 3))  # what is loaded at the first use
frames = from_array(np.zeros((16, 1024, 1024, 3), np.uint8))
told = {"grey": png(0, 4096, 1), "rgb": png(2, 4096, 3), "rgba": png(6, 4096, 4), "resized": png(2, 4095, 3), "frames": frames}
print(json.dumps({name: taken(image) for name, image in told.items()}))
"""
"""The most memory that each took while its pixels were made, by what the pixels take, 192 MiB of float32."""


@pytest.fixture(scope="module", params=["sd", "tiny"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, tmp_path: Path) -> Iterator[OneModel]:
    model = OneModel(save_tiny_vae(kind, tmp_path))
    yield model
    model.close()


def modes_of(kind: str) -> list[SampleMode]:
    return [mode for mode in SampleMode if kind != "tiny" or mode is not SampleMode.MOMENTS]


def encoded(model: OneModel, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE) -> Result:
    return asyncio.run(model.pipeline.encode(EncodeRequest(from_array(pixels), sample_mode=mode, seed=7)))


def diffusers_encode(vae: Any, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE) -> torch.Tensor:
    with torch.inference_mode():
        made = vae.encode(pixels)
    if hasattr(made, "latents"):
        return made.latents
    seeded, of = torch.Generator().manual_seed(7), made.latent_dist
    return {"sample": lambda: of.sample(seeded), "argmax": of.mode, "moments": lambda: of.parameters}[mode.value]()


def in_tiles(model: OneModel, kind: str, plan: TilingPlan = TILED) -> Any:
    """diffusers' own tiling, of the size and overlap of the plan."""
    return view(tiny_vae(kind), plan, model.engine.space.family.tile, 8)


def out_of_memory(model: OneModel, unless: Callable[[torch.Tensor], bool]) -> Any:
    def hook(_: Any, given: tuple[torch.Tensor]) -> None:
        if not unless(given[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    return model.engine._model(torch.float32).encoder.register_forward_pre_hook(hook)


def test_a_picture_that_does_not_fit_whole_is_encoded_in_tiles_and_says_so(model: OneModel, kind: str) -> None:
    told, pixels = model.engine.planner.estimator(torch.float32), latents(*LARGE).clamp(-1, 1)
    model.set_free(told.encode(LARGE, UNTILED))
    for mode in modes_of(kind):
        whole = encoded(model, pixels, mode)
        assert torch.equal(to_torch(whole.tensor), diffusers_encode(tiny_vae(kind), pixels, mode))
        assert (whole.provenance.tiling, model.events) == ("", {})
        del whole  # it takes room
    model.set_free(told.encode(LARGE, UNTILED) - 1)
    model.live.peak = 0
    for mode in modes_of(kind):
        tiled = encoded(model, pixels, mode)
        assert torch.equal(to_torch(tiled.tensor), diffusers_encode(in_tiles(model, kind), pixels, mode))
        assert tiled.provenance.tiling == "256"
    assert model.events == {"tiled": len(modes_of(kind))}
    assert 0.8 * told.encode(LARGE, TILED) < model.live.peak <= told.encode(LARGE, TILED)


def test_over_http_the_answer_says_that_tiles_were_used(model: OneModel, kind: str) -> None:
    model.set_free(model.engine.planner.estimator(torch.float32).encode(LARGE, UNTILED) - 1)
    with served(create_app(InProcess(model=model.pipeline.answer), 1 << 24, 60)) as url:
        ours = remote_encode(f"{url}/model", latents(*LARGE), seed=7)
        answer = model._client.post("/model/encode", **as_http(latents(*LARGE)))
    assert torch.equal(ours, diffusers_encode(in_tiles(model, kind), latents(*LARGE)))
    assert answer.headers["x-vae-tiling"] == "256"


def as_http(pixels: torch.Tensor) -> dict[str, Any]:
    query, headers, body = EncodeRequest(from_array(pixels)).to_http()
    return {"params": query, "headers": headers, "content": bytes(body)}


def test_a_batch_that_does_not_fit_at_once_is_encoded_as_diffusers_slices_it(model: OneModel, kind: str) -> None:
    shape, vae = (5, 3, 64, 40), tiny_vae(kind)
    told, pixels = model.engine.planner.estimator(torch.float32), latents(*shape)
    model.set_free(told.encode(shape, ONE_BY_ONE))
    assert model.engine.planner.free < told.encode(shape, UNTILED) / 2
    vae.use_slicing = True
    for mode in modes_of(kind):
        result = encoded(model, pixels, mode)
        assert torch.equal(to_torch(result.tensor), diffusers_encode(vae, pixels, mode))
        assert result.provenance.tiling == ""
        del result  # it takes room
    assert model.live.peak <= model.engine.planner.free


def test_what_does_not_fit_in_tiles_either_is_refused_with_the_numbers(model: OneModel) -> None:
    model.set_free(model.engine.planner.estimator(torch.float32).encode(LARGE, TILED) - 1)
    with pytest.raises(
        BadRequest, match=r"Encoding pixels.*320, 288.*GiB of memory, and .*smallest tiles.*GiB"
    ) as caught:
        encoded(model, latents(*LARGE))
    assert caught.value.parameter == "shape"


def test_out_of_memory_is_encoded_again_in_tiles_with_the_same_seed_and_learned_from(
    model: OneModel, kind: str
) -> None:
    told = model.engine.planner.estimator(torch.float32).encode(LARGE)
    hook = out_of_memory(model, lambda pixels: pixels.shape[-2] <= 256)
    result = encoded(model, latents(*LARGE))
    assert result.provenance.tiling == "256"
    assert torch.equal(to_torch(result.tensor), diffusers_encode(in_tiles(model, kind), latents(*LARGE)))
    assert (model.events["out_of_memory"], model.events["tiled"]) == (1, 1)
    assert model.engine.planner.estimator(torch.float32).encode(LARGE) > told
    hook.remove()
    assert encoded(model, latents(*LARGE)).provenance.tiling == ""


def test_out_of_memory_of_one_batch_is_encoded_one_by_one(model: OneModel, kind: str) -> None:
    out_of_memory(model, lambda pixels: len(pixels) == 1)
    vae = tiny_vae(kind)
    vae.use_slicing = True
    result = encoded(model, latents(3, 3, 32, 16))
    assert torch.equal(to_torch(result.tensor), diffusers_encode(vae, latents(3, 3, 32, 16)))
    assert (result.provenance.tiling, model.events) == ("", {"out_of_memory": 1})


def test_out_of_memory_in_the_smallest_tiles_is_a_503_and_the_replica_lives_on(model: OneModel) -> None:
    hook = out_of_memory(model, lambda pixels: False)
    for shape in ((1, 3, 32, 32), LARGE, (2, 3, 32, 32)):
        with pytest.raises(Unavailable, match="Out of memory"):
            encoded(model, latents(*shape))
    hook.remove()
    assert encoded(model, latents(*LARGE)).shape == (1, 4, 40, 36)


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists(), reason="Linux alone can forget how much memory a process had at most")
def test_a_picture_takes_little_more_than_its_pixels_before_it_is_encoded() -> None:
    """A small file may hold a large picture. Pillow's RGB takes a third of its pixels in float32; one that is resized is held
    twice, frames one at a time."""
    told = json.loads(printed_by(OF_PICTURES, environment=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}))
    assert all(taken > 0.9 for taken in told.values()), told  # the measure works
    assert max(told["grey"], told["rgb"], told["rgba"]) < 1.45, told
    assert told["resized"] < 1.8, told
    assert told["frames"] < 1.1, told


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_on_a_gpu_the_forecast_learns_from_what_either_took(
    model: OneModel, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    told = model.engine.planner.estimator(torch.float32)
    shape = LARGE if work == "encode" else (1, 4, 40, 36)
    predict = getattr(told, work)
    before = predict(shape, UNTILED)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + 2**28 + int(1.5 * before))
    monkeypatch.setattr(model.engine, "_to_device", lambda tensor, dtype: tensor)
    model.engine.device = "cuda"
    model.engine.decode(latents(*shape)) if work == "decode" else model.engine.encode(latents(*shape))
    assert predict(shape, UNTILED) == pytest.approx(1.5 * before, rel=1e-6)
