"""What a seed means for a batch: each sample draws noise of its own, the same however the batch travels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from client_commands import here, succeed
from families.images import CASES
from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae import remote_decode, remote_encode
from remote_vae.calls.decode_call import DecodeCall
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.engine import diffusers_engine as module_of_the_engine
from remote_vae_serve.http.app import create_app
from samples import latents, save_tiny_vae
from scripted_server import Exchange, ScriptedServer
from served import served

__all__ = ["here"]  # fixture
CASE = next(case for case in CASES if case.class_name == "ConsistencyDecoderVAE")
THREE = torch.cat([latents(1, 4, 4, 6)] * 3)
LARGEST = 2**63 - 1


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A decoder that draws noise, `drawing`, and one that draws none, `sd`."""
    folders = {"drawing": tmp_path_factory.mktemp("drawing"), "sd": tmp_path_factory.mktemp("sd")}
    CASE.build().save_pretrained(folders["drawing"])
    save_tiny_vae("sd", folders["sd"])
    pipelines = {name: pipeline_of(diffusers_engine(folder), name) for name, folder in folders.items()}
    models = InProcess(**{name: pipeline.answer for name, pipeline in pipelines.items()})
    with served(create_app(models, 1 << 24, 60)) as url:
        yield url
    for pipeline in pipelines.values():
        pipeline.close()


@pytest.mark.parametrize(
    ("seed", "seeds"), [(7, [7, 8, 9]), (LARGEST - 1, [LARGEST - 1, LARGEST, 0]), (None, [None] * 3)]
)
def test_a_call_that_is_split_sends_a_seed_for_each_sample(seed: int | None, seeds: list[int | None]) -> None:
    requests = DecodeCall(THREE, hints=Hints(seed=seed, denormalized=True)).requests()
    assert [request.hints for request in requests] == [Hints(seed=one, denormalized=True) for one in seeds]


def test_the_command_line_sends_a_seed_for_each_sample(here: Path) -> None:
    seeds = []

    def answer(exchange: Exchange) -> None:
        seeds.append(exchange.decode_request().hints.seed)
        exchange.reply(200, {"content-type": "image/png"}, b"a picture")

    save_file({"latents": THREE}, "three.safetensors")
    with ScriptedServer(answer) as server:
        succeed("decode", server.url, "three.safetensors", "-o", "a.png", "--hint", "seed=7")
    assert sorted(seeds) == [7, 8, 9]


def test_what_is_not_split_sends_its_seed_as_it_is() -> None:
    (request,) = DecodeCall(THREE, output_type="pt", hints=Hints(seed=7)).requests()
    assert request.hints.seed == 7


def test_pictures_of_one_call_draw_different_noise_and_the_same_as_one_request_for_all(url: str) -> None:
    apart = [np.asarray(one) for one in remote_decode(f"{url}/drawing", THREE, image_format="png", seed=7)]
    for one, next_one in pairwise(apart):
        assert np.abs(one.astype(int) - next_one).max() > 16
    whole = remote_decode(f"{url}/drawing", THREE, output_type="pt", partial_postprocess=True, return_type="pt", seed=7)
    # A batch rounds otherwise than each alone, by 2e-6 of 1.
    assert np.abs(np.stack(apart).astype(int) - whole.numpy()).max() <= 1
    again = remote_decode(f"{url}/drawing", THREE, image_format="png", seed=7)
    assert np.array_equal(np.stack(apart), np.stack([np.asarray(one) for one in again]))


def test_a_picture_alone_draws_what_diffusers_draws_of_the_seed(url: str) -> None:
    ours = remote_decode(f"{url}/drawing", THREE[:1], output_type="pt", seed=7, do_scaling=False)
    theirs = CASE.build().decode(THREE[:1], torch.Generator().manual_seed(7)).sample
    assert torch.equal(ours, theirs)


def test_pictures_that_are_encoded_together_draw_different_noise_and_the_same_once_more(url: str) -> None:
    pixels = torch.cat([latents(1, 3, 16, 24).tanh()] * 3)
    for model in ("sd", "drawing"):
        drawn = remote_encode(f"{url}/{model}", pixels, seed=7)
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[1], drawn[2])
        assert torch.equal(drawn, remote_encode(f"{url}/{model}", pixels, seed=7))


def test_seeds_keep_nothing_apart_that_draws_no_noise(tmp_path: Path) -> None:
    """Requests run as one batch only where their hints are equal."""
    processor = diffusers_engine(save_tiny_vae("sd", tmp_path)).processor
    seeded = [DecodeRequest(from_array(THREE[:1]), hints=Hints(seed=seed)) for seed in (7, 8)]
    assert processor.unpack_latents(seeded[0]).hints == processor.unpack_latents(seeded[1]).hints


def test_a_seed_draws_the_same_noise_where_auto_encodes_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch draws the last 16 otherwise where their number is no multiple of that: here are 140 latents."""
    monkeypatch.setattr(module_of_the_engine, "is_bfloat16_faster", lambda: True)
    save_tiny_vae("sd", tmp_path)
    engines = [diffusers_engine(tmp_path, dtype=dtype) for dtype in ("float32", "auto")]
    pixels = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact, ours = (
        engine.encode(pixels.to(engine.encode_dtype), SampleMode.SAMPLE, torch.Generator().manual_seed(5)).latents
        for engine in engines
    )
    assert ours.dtype is torch.bfloat16
    assert (ours.float() - exact).square().mean() < 1e-3 * exact.var()
