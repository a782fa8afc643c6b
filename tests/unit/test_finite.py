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

from in_process import diffusers_engine
from one_model import OneModel
from remote_vae.decoding import DecodeRequest, Output
from remote_vae.tensors import from_array, to_torch
from remote_vae.wire import Result
from remote_vae_serve.eager import EagerEngine
from remote_vae_serve.tiling import Plan
from samples import latents, tiny_vae

DIM, BRIGHT = 0.01, 10.0
"""What latents are multiplied with, to stay within float16 in the decoder and to leave it."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    decode = served.engine.decode

    def spied(latents: torch.Tensor, plan: Plan) -> Any:
        sizes.append(len(latents))
        return decode(latents, plan)

    served.engine.decode = spied  # type: ignore[method-assign]

    async def together() -> list[Result]:
        requests = [DecodeRequest(from_array(one), output=Output.PT) for one in z]
        return await asyncio.gather(*map(served.pipeline.decode, requests))

    results = asyncio.run(together())
    served.close()
    assert max(sizes) > 1
    for number, result in enumerate(results):
        pixels = to_torch(result.tensor)
        if number == 2:
            assert result.provenance.dtype == "float32"
            assert torch.equal(pixels, in_float32(overflowing(), z[2]))
        else:
            torch.testing.assert_close(pixels, alone[number], rtol=0, atol=5e-3)


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

    async def together() -> list[Any]:
        requests = [DecodeRequest(from_array(one), output=Output.PT) for one in (good, good, bad, good)]
        return await asyncio.gather(*map(served.pipeline.decode, requests), return_exceptions=True)

    answers = asyncio.run(together())
    served.close()
    assert [type(answer).__name__ for answer in answers] == ["Result", "Result", "BadRequest", "Result"]
    assert {answer.provenance.dtype for answer in (answers[0], answers[1], answers[3])} == {"float16"}


def test_float32_that_does_not_fit_beside_the_half_is_refused_with_the_number(model: OneModel) -> None:
    engine = model.engine
    z = BRIGHT * latents(1, 4, 8, 8)
    needed = engine.forecast(torch.float32).decode(tuple(z.shape), Plan()) + engine.forecast(torch.float32).weights
    engine._budget = engine.forecast(torch.float16).weights + needed - 1
    refused = model.post(z)
    assert (refused.status_code, refused.json()["parameter"]) == (400, "shape")
    assert "GiB" in refused.json()["error"]
    assert list(engine._models) == [torch.float16]
    engine._budget += 1
    assert model.decode(z)[1] == "float32"


def test_tiles_are_kept_to_where_float32_does_not_fit_whole(model: OneModel) -> None:
    engine, z = model.engine, BRIGHT * latents(1, 4, 36, 36)
    whole, tiled = (engine.forecast(torch.float32).decode(tuple(z.shape), plan) for plan in (Plan(), Plan(256)))
    engine._budget = (
        sum(engine.forecast(dtype).weights for dtype in (torch.float16, torch.float32)) + (whole + tiled) // 2
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
    assert isinstance(model.engine, EagerEngine)
