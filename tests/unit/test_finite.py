"""Half precision that overflows: decoded again in float32, and said so; what is no picture in float32 either is refused."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from in_process import diffusers_engine, fake_engine
from one_model import OneModel
from remote_vae.errors import BadRequest
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.engine.memory.estimate import LiveBytes
from remote_vae_serve.engine.tiling import TilingPlan
from remote_vae_serve.families.layouts import RequestHints
from remote_vae_serve.processing.finite import is_finite
from remote_vae_serve.replica.pipeline import Pipeline
from samples import latents, tiny_vae

DIM, BRIGHT = 0.01, 10.0
"""What latents are multiplied with, to stay within float16 in the decoder and to leave it."""


def overflowing(kind: str = "sd") -> Any:
    """A decoder whose first activations are too large for float16 where latents are bright; norms make them small again."""
    vae = tiny_vae(kind)
    vae.decoder.conv_in.weight.data *= 2e4
    vae.decoder.conv_in.bias.data.zero_()
    if getattr(vae, "post_quant_conv", None) is not None:
        vae.post_quant_conv.bias.data.zero_()
    return vae


def saved(vae: Any, folder: Path, **config: Any) -> Path:
    """With what config.json says of `force_upcast` taken out: diffusers writes the class's default down."""
    vae.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written.pop("force_upcast", None)
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(overflowing(), tmp_path_factory.mktemp("overflowing"))


@pytest.fixture
def model(folder: Path) -> Iterator[OneModel]:
    served = OneModel(folder, dtype="float16")
    yield served
    served.close()


def in_float32(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return vae.decode(z.half().float()).sample.half()


def test_what_overflows_in_float16_is_decoded_in_float32_and_the_answer_says_so(model: OneModel) -> None:
    z = latents(1, 4, 8, 12)
    pixels, dtype = model.decode(BRIGHT * z)
    with torch.inference_mode():
        assert not overflowing().half().decode((BRIGHT * z).half()).sample.isfinite().all()
    assert (pixels.dtype, dtype) == (torch.float16, "float32")
    assert torch.equal(pixels, in_float32(overflowing(), BRIGHT * z))
    assert model.events == {"float32": 1}


def test_what_does_not_stays_in_float16_and_float32_weights_are_never_loaded(model: OneModel) -> None:
    z = DIM * latents(1, 4, 8, 12)
    pixels, dtype = model.decode(z)
    with torch.inference_mode():
        assert torch.equal(pixels, overflowing().half().decode(z.half()).sample)
    assert (dtype, list(model.engine._models), model.events) == ("float16", [torch.float16], {})


def test_on_a_cpu_what_is_not_finite_in_bfloat16_is_decoded_in_float32(folder: Path) -> None:
    served = OneModel(folder, dtype="bfloat16")
    z = DIM * latents(1, 4, 8, 12)
    served.engine._model(torch.bfloat16).decoder.register_forward_hook(lambda decoder, given, made: made * torch.nan)
    pixels, dtype = served.decode(z)
    with torch.inference_mode():
        exact = overflowing().decode(z.bfloat16().float()).sample.bfloat16()
    assert torch.equal(pixels, exact)
    assert (pixels.dtype, dtype, served.events) == (torch.bfloat16, "float32", {"float32": 1})
    served.close()


def test_a_picture_is_as_good_from_float32_as_any_other(model: OneModel) -> None:
    answer = model.post(BRIGHT * latents(1, 4, 8, 12), Output.PNG)
    assert (answer.status_code, answer.headers["x-vae-dtype"]) == (200, "float32")
    assert answer.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("bright", [0, 1, 2])
def test_a_batch_one_of_which_overflows_is_answered_and_its_neighbours_are_what_they_are_alone(
    model: OneModel, bright: int
) -> None:
    z = DIM * latents(3, 4, 8, 8)
    alone = [model.decode(one[None])[0] for one in z]
    z[bright] *= BRIGHT / DIM
    pixels, dtype = model.decode(z)
    assert dtype == "float32"
    for number in range(3):
        expected = in_float32(overflowing(), z[bright][None]) if number == bright else alone[number]
        assert torch.equal(pixels[number : number + 1], expected)


def test_frames_of_a_video_of_which_one_overflows_are_all_there(model: OneModel) -> None:
    z = DIM * latents(1, 4, 3, 8, 8)
    z[:, :, 1] *= BRIGHT / DIM
    pixels, _ = model.decode(z)
    assert pixels.shape == (1, 3, 3, 64, 64)
    assert pixels.isfinite().all()
    assert torch.equal(pixels[:, :, 1], in_float32(overflowing(), z[:, :, 1]))


def test_requests_that_ran_as_one_batch_do_not_suffer_for_the_one_that_overflows(folder: Path) -> None:
    served = OneModel(folder, dtype="float16", batching="auto")
    z = [DIM * one[None] for one in latents(4, 4, 8, 8)]
    alone = [served.decode(one)[0] for one in z]
    z[2] = z[2] * (BRIGHT / DIM)
    sizes: list[int] = []
    decode_together = served.engine.decode_together

    def spied(latents: torch.Tensor, plan: TilingPlan, said: RequestHints) -> Any:
        sizes.append(len(latents))
        return decode_together(latents, plan, said)

    served.engine.decode_together = spied  # type: ignore[method-assign]

    results = served.together(z)
    served.close()
    assert sizes == [4]
    assert [result.provenance.dtype for result in results] == ["float16", "float16", "float32", "float16"]
    for number, result in enumerate(results):
        expected = in_float32(overflowing(), z[2]) if number == 2 else alone[number]
        assert torch.equal(to_torch(result.tensor), expected)


def dim_encoder() -> Any:
    """As `overflowing`, of an encoder: of pixels that are bright."""
    vae = tiny_vae("sd")
    vae.encoder.conv_in.weight.data *= 2e4
    vae.encoder.conv_in.bias.data.zero_()
    return vae


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(dim_encoder(), tmp_path_factory.mktemp("encoder"))


def encoded(pipeline: Pipeline, pixels: torch.Tensor, mode: SampleMode) -> Result:
    return asyncio.run(pipeline.encode(EncodeRequest(from_array(pixels), sample_mode=mode, seed=7)))


def diffusers_encode(vae: Any, pixels: torch.Tensor, mode: SampleMode) -> torch.Tensor:
    with torch.inference_mode():
        distribution = vae.encode(pixels).latent_dist
    seeded = torch.Generator().manual_seed(7)
    return {"sample": lambda: distribution.sample(seeded), "argmax": distribution.mode,
            "moments": lambda: distribution.parameters}[mode.value]()  # fmt: skip


@pytest.mark.parametrize("mode", SampleMode)
def test_an_encode_that_overflows_in_float16_is_diffusers_in_float32_and_the_answer_says_so(
    encoder: Path, mode: SampleMode
) -> None:
    served = OneModel(encoder, encode_dtype="float16")
    dim, bright = (factor * latents(2, 3, 32, 16) for factor in (DIM, BRIGHT))
    half = encoded(served.pipeline, dim, mode)
    assert torch.equal(to_torch(half.tensor), diffusers_encode(dim_encoder().half(), dim.half(), mode))
    assert (half.provenance.dtype, served.events) == ("float16", {})
    assert not diffusers_encode(dim_encoder().half(), bright.half(), mode).isfinite().all()
    wide = encoded(served.pipeline, bright, mode)
    served.close()
    assert torch.equal(to_torch(wide.tensor), diffusers_encode(dim_encoder(), bright.half().float(), mode))
    assert (wide.provenance.dtype, served.events) == ("float32", {"float32": 1})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_picture_of_which_nothing_finite_can_be_encoded_is_an_error_about_the_picture(
    tmp_path: Path, dtype: str
) -> None:
    vae = dim_encoder()
    vae.encoder.conv_in.weight.data *= 1e30
    vae.encoder.down_blocks[0].resnets[0].norm1.weight.data *= 1e30
    served = OneModel(saved(vae, tmp_path), encode_dtype=dtype)
    with pytest.raises(BadRequest, match=r"NaN or infinity.*float32 too.*-1 to 1") as caught:
        encoded(served.pipeline, latents(1, 3, 16, 16), SampleMode.ARGMAX)
    served.close()
    assert caught.value.parameter == "image"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_no_number_is_found_wherever_it_is_without_a_copy(dtype: torch.dtype) -> None:
    values = latents(2, 3, 40, 50).to(dtype)
    assert is_finite(values)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 5999, values.numel() - 1):
            broken = values.clone()
            broken.view(-1)[place] = bad
            with LiveBytes() as live:
                assert not is_finite(broken)
                assert not is_finite(broken.permute(0, 2, 3, 1))
            assert live.peak < 100
    assert is_finite(values[:0])


def test_a_request_is_looked_through_without_a_copy_of_it() -> None:
    z, pixels = latents(1, 4, 200, 200), latents(1, 3, 400, 400)
    engine = fake_engine()
    with LiveBytes() as live:
        engine.processor.unpack_latents(DecodeRequest(from_array(z), output=Output.PT))
        engine.processor.preprocess_image(EncodeRequest(from_array(pixels)))
    assert live.peak < 1000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_in_float32_either_is_an_error_about_the_latents(tmp_path: Path, dtype: str) -> None:
    vae = tiny_vae("sd")
    vae.decoder.conv_in.weight.data *= 1e30
    vae.decoder.mid_block.resnets[0].norm1.weight.data *= 1e30  # finite latents, infinite in between
    served = OneModel(saved(vae, tmp_path), dtype=dtype)
    answer = served.post(latents(1, 4, 8, 8))
    served.close()
    assert (answer.status_code, answer.json()["parameter"]) == (400, "tensor")
    for words in ("NaN or infinity", "float32 too", "of this model", "scaling"):
        assert words in answer.json()["error"]


def test_a_batch_with_a_member_that_is_no_picture_at_all_fails_alone(folder: Path) -> None:
    """Within a group of requests: the Device runs its members one by one."""
    served = OneModel(folder, dtype="float16", batching="auto")
    good, bad = DIM * latents(1, 4, 8, 8), BRIGHT * latents(1, 4, 8, 8)
    served.decode(bad)
    for parameter in served.engine._models[torch.float32].parameters():
        parameter.data.fill_(float("nan"))

    answers = served.together([good, good, bad, good])
    served.close()
    assert [type(answer).__name__ for answer in answers] == ["Result", "Result", "BadRequest", "Result"]
    assert {answer.provenance.dtype for answer in (answers[0], answers[1], answers[3])} == {"float16"}


def test_float32_that_does_not_fit_beside_the_half_is_refused_with_the_number(model: OneModel) -> None:
    engine = model.engine
    z = BRIGHT * latents(1, 4, 8, 8)
    needed = (
        engine.planner.estimator(torch.float32).decode(tuple(z.shape), TilingPlan())
        + engine.planner.estimator(torch.float32).weights
    )
    engine.planner.budget = engine.planner.estimator(torch.float16).weights + needed - 1
    refused = model.post(z)
    assert (refused.status_code, refused.json()["parameter"]) == (400, "shape")
    assert "GiB" in refused.json()["error"]
    assert list(engine._models) == [torch.float16]
    engine.planner.budget += 1
    assert model.decode(z)[1] == "float32"


def test_tiles_are_kept_to_where_float32_does_not_fit_whole(model: OneModel) -> None:
    engine, z = model.engine, BRIGHT * latents(1, 4, 36, 36)
    whole, tiled = (
        engine.planner.estimator(torch.float32).decode(tuple(z.shape), plan) for plan in (TilingPlan(), TilingPlan(256))
    )
    engine.planner.budget = (
        sum(engine.planner.estimator(dtype).weights for dtype in (torch.float16, torch.float32)) + (whole + tiled) // 2
    )
    answer = model.post(z)
    assert (answer.status_code, answer.headers["x-vae-dtype"], answer.headers["x-vae-tiling"]) == (
        200,
        "float32",
        "256",
    )
    assert model.post(DIM * z).headers["x-vae-dtype"] == "float16"


@pytest.mark.parametrize(
    ("config", "asked", "got"),
    [({"force_upcast": True}, "float16", torch.float32), ({"force_upcast": True}, "bfloat16", torch.bfloat16),
     ({"force_upcast": False}, "float16", torch.float16), ({}, "float16", torch.float16)],
)  # fmt: skip
def test_a_model_that_says_it_overflows_never_runs_in_float16_and_one_that_says_nothing_does(
    tmp_path: Path, config: dict[str, Any], asked: str, got: torch.dtype
) -> None:
    engine = diffusers_engine(saved(tiny_vae("sd"), tmp_path, **config), dtype=asked, encode_dtype=asked)
    assert (engine.dtype, engine.encode_dtype) == (got, got)


def test_on_a_gpu_auto_is_a_dtype_that_the_model_does_not_overflow_in(tmp_path: Path) -> None:
    for number, (config, expected) in enumerate([({"force_upcast": True}, torch.bfloat16), ({}, torch.float16)]):
        space = diffusers_engine(saved(tiny_vae("sd"), tmp_path / str(number), **config)).space
        assert space.family.safe_dtype(space, "cuda") is expected
        assert space.family.safe_encode_dtype(space, "cuda") in (torch.float32, torch.float16)


def test_a_replica_logs_nothing_of_the_latents(model: OneModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ray.serve"):
        model.decode(BRIGHT * latents(1, 4, 8, 8))
    assert "tensor(" not in caplog.text
    assert isinstance(model.engine, DiffusersEngine)
