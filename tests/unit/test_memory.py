"""A budget of memory that is kept: whole where it fits, else in tiles, else refused; and out of memory is survived."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from diffusers import AutoencoderKL

from one_model import OneModel, pixels_of
from remote_vae.errors import BadRequest, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae_serve.engine.memory.budget import GIB
from remote_vae_serve.engine.tiling import ONE_BY_ONE, UNTILED, TilingPlan, view
from samples import KL, latents, save_tiny_vae, tiny_vae
from served import served

NARROW = (16, 32, 64, 64)
SMALL, LARGE = (1, 4, 12, 12), (1, 4, 40, 36)
TILED = TilingPlan(256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def model(folder: Path) -> Iterator[OneModel]:
    model = OneModel(folder)
    yield model
    model.close()


def between(model: OneModel, shape: tuple[int, ...]) -> int:
    """A number of bytes that a decode in tiles fits into, and a whole one does not."""
    whole, tiled = (model.engine.planner.estimator(torch.float32).decode(shape, plan) for plan in (UNTILED, TILED))
    assert tiled < whole
    return tiled + (whole - tiled) // 8


@pytest.mark.slow
def test_1024_pixels_are_decoded_in_tiles_within_a_budget_that_the_whole_exceeds(tmp_path: Path) -> None:
    shape = (1, 4, 128, 128)
    AutoencoderKL(**KL | {"block_out_channels": NARROW, "norm_num_groups": 8}).save_pretrained(tmp_path)
    model = OneModel(tmp_path, threads=2)
    told = model.engine.planner.estimator(torch.float32)
    model.set_free(told.decode(shape, TilingPlan(512)) + 2**20)
    assert told.decode(shape, UNTILED) > model.engine.planner.free
    answer = model.post(latents(*shape))
    model.close()
    assert (answer.status_code, answer.headers["x-vae-tiling"]) == (200, "512")
    pixels = pixels_of(answer)
    assert (pixels.shape, bool(pixels.isfinite().all())) == ((1, 3, 1024, 1024), True)
    assert told.decode(shape, TilingPlan(512)) * 0.9 < model.live.peak <= model.engine.planner.free
    assert model.events == {"tiled": 1}


def test_a_decode_that_fits_is_whole_and_says_nothing_of_tiles(model: OneModel) -> None:
    model.set_free(model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED))
    answer = model.post(latents(*LARGE))
    assert (answer.status_code, "x-vae-tiling" in answer.headers, model.events) == (200, False, {})
    with torch.inference_mode():
        assert torch.equal(pixels_of(answer), tiny_vae("sd").decode(latents(*LARGE)).sample)


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_no_request_at_the_edge_of_the_budget_is_lost_and_the_budget_is_kept(folder: Path, at_once: int) -> None:
    model = OneModel(folder, batching="auto")
    model.set_free(between(model, LARGE))
    shapes = [SMALL, (1, 4, 8, 40), LARGE, (2, 4, 12, 12), (5, 4, 12, 12), (1, 4, 28, 20), SMALL, (12, 4, 40, 36),
              SMALL, (1, 4, 36, 40)]  # fmt: skip
    expected: Counter[tuple[int, str]] = Counter()
    for shape in shapes * 5:
        try:
            expected[200, str(model.engine.plan_decode(shape))] += 1
        except BadRequest:
            expected[400, ""] += 1
    assert len(expected) == 3

    def ask(url: str, shape: tuple[int, ...]) -> tuple[int, str]:
        query, headers, body = DecodeRequest(from_array(latents(*shape)), output=Output.PT).to_http()
        answer = requests.post(f"{url}/model", params=query, headers=headers, data=bytes(body), timeout=60)
        if answer.status_code == 200:
            pixels = pixels_of(answer)
            assert pixels.shape == (shape[0], 3, 8 * shape[2], 8 * shape[3])
            assert pixels.isfinite().all()
        else:
            assert answer.json()["parameter"] == "shape"
            assert "GiB" in answer.json()["error"]
        return answer.status_code, answer.headers.get("x-vae-tiling", "")

    with served(model.app) as url, ThreadPoolExecutor(at_once) as clients:
        answers = Counter(clients.map(ask, [url] * 50, shapes * 5))
    model.close()
    assert answers == expected
    assert 0.9 * model.engine.planner.free < model.live.peak <= model.engine.planner.free
    assert model.events["out_of_memory"] == 0


def test_what_never_fits_is_refused_with_what_it_takes_and_what_there_is(model: OneModel) -> None:
    model.set_free(3 * 2**20)
    answer = model.post(latents(*LARGE))
    assert (answer.status_code, answer.json()["parameter"]) == (400, "shape")
    told = model.engine.planner.estimator(torch.float32)
    for number in (told.decode(LARGE, UNTILED), told.decode(LARGE, TILED), model.engine.planner.free):
        assert f"{number / GIB:.2f} GiB" in answer.json()["error"]
    assert "[1, 4, 40, 36]" in answer.json()["error"]
    small = model.post(latents(1, 4, 24, 24))  # of one tile
    assert "tiles" not in small.json()["error"]
    assert model.post(latents(1, 4, 4, 4)).status_code == 200


def test_a_batch_that_does_not_fit_at_once_is_decoded_one_by_one_and_nothing_is_in_tiles(model: OneModel) -> None:
    shape = (6, 4, 40, 36)
    told = model.engine.planner.estimator(torch.float32)
    model.set_free(told.decode(shape, ONE_BY_ONE))
    assert model.engine.planner.free < told.decode(shape, UNTILED) / 2
    answer = model.post(latents(*shape))
    assert (answer.status_code, "x-vae-tiling" in answer.headers, model.events) == (200, False, {})
    vae = tiny_vae("sd")
    with torch.inference_mode():
        assert torch.equal(pixels_of(answer), torch.cat([vae.decode(one[None]).sample for one in latents(*shape)]))
    assert 0.9 * model.engine.planner.free < model.live.peak <= model.engine.planner.free
    model.set_free(told.decode(shape, ONE_BY_ONE) - 1)
    assert model.post(latents(*shape)).headers["x-vae-tiling"] == "256"
    assert model.live.peak <= model.engine.planner.free + 1


def test_a_model_for_which_batches_are_worth_nothing_never_gets_one(tmp_path: Path) -> None:
    model = OneModel(save_tiny_vae("hunyuan", tmp_path))
    sizes: list[int] = []
    model.engine._model(torch.float32).decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    z = latents(3, 4, 2, 4, 4)
    answer, vae = model.post(z), tiny_vae("hunyuan")
    model.close()
    with torch.inference_mode():
        assert torch.equal(pixels_of(answer), torch.cat([vae.decode(one[None]).sample for one in z]))
    assert sizes == [1, 1, 1]


def test_an_encode_that_does_not_fit_is_refused_with_the_number(model: OneModel) -> None:
    pixels = latents(1, 3, 256, 256)
    model.set_free(model.engine.planner.estimator(torch.float32).encode((1, 3, 256, 256)) - 1)
    request = EncodeRequest(from_array(pixels), sample_mode=SampleMode.ARGMAX)
    with pytest.raises(BadRequest, match=r"256.*GiB.*GiB") as caught:
        asyncio.run(model.pipeline.encode(request))
    assert caught.value.parameter == "shape"
    model.set_free(model.engine.planner.free + 1)
    assert asyncio.run(model.pipeline.encode(request)).shape == (1, 4, 32, 32)


def cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def cpu_allocator() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def library_error() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def python_error() -> None:
    raise MemoryError


ERRORS = [cuda_error, cpu_allocator, library_error, python_error]


def out_of_memory(
    model: OneModel, unless: Callable[[torch.Tensor], bool], fail: Callable[[], None] = cuda_error
) -> Any:
    """Memory runs out in the middle of each decode whose latents, a tile's for a tile, are not so. A handle to remove it."""

    def hook(module: Any, given: tuple[torch.Tensor]) -> None:
        if not unless(given[0]):
            fail()

    return model.engine._model(torch.float32).decoder.up_blocks[0].register_forward_pre_hook(hook)


@pytest.mark.parametrize("fail", ERRORS)
def test_out_of_memory_is_decoded_again_in_tiles_and_learned_from(model: OneModel, fail: Callable[[], None]) -> None:
    told = model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED)
    hook = out_of_memory(model, lambda z: z.shape[-2] <= 32, fail)
    answer = model.post(latents(*LARGE))
    assert (answer.status_code, answer.headers["x-vae-tiling"]) == (200, "256")
    with torch.inference_mode():
        tiled = view(tiny_vae("sd"), TILED, model.engine.space.family.tile, 8)
        assert torch.equal(pixels_of(answer), tiled.decode(latents(*LARGE)).sample)
    assert (model.events["out_of_memory"], model.events["tiled"]) == (1, 1)
    assert model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED) > told
    hook.remove()
    assert "x-vae-tiling" not in model.post(latents(*LARGE)).headers


def test_a_prediction_that_was_too_low_is_corrected_until_tiles_are_chosen_at_once(model: OneModel) -> None:
    model.set_free(int(1.05 * model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED)))
    out_of_memory(model, lambda z: z.shape[-2] <= 32)
    assert [model.post(latents(*LARGE)).headers["x-vae-tiling"] for _ in range(3)] == ["256"] * 3
    assert model.events["out_of_memory"] == 1


def test_what_failed_leaves_no_tensor_behind_when_it_is_tried_again(model: OneModel) -> None:
    held: list[int] = []

    def fits(z: torch.Tensor) -> bool:
        held.append(model.live.now)
        return z.shape[-2] <= 32

    out_of_memory(model, fits)
    assert model.post(latents(*LARGE)).status_code == 200
    assert held[1] < held[0]  # a tile's, not those and the whole's
    assert model.live.now <= 3 * 4 * 320 * 288


def test_out_of_memory_in_the_smallest_tiles_is_a_503_and_the_replica_lives_on(model: OneModel) -> None:
    hook = out_of_memory(model, lambda z: False)
    for shape in (SMALL, LARGE, (2, 4, 12, 12)):
        answer = model.post(latents(*shape))
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "ut of memory" in answer.json()["error"]
        assert float(answer.headers["retry-after"]) > 0
    hook.remove()
    assert model.post(latents(*LARGE)).status_code == 200


def test_an_error_of_another_kind_is_not_taken_for_want_of_memory(model: OneModel) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    out_of_memory(model, lambda z: False, fail)
    with pytest.raises(RuntimeError, match="mat1"):
        model.engine.decode(latents(*SMALL))
    assert model.events == {}


@pytest.mark.parametrize("shape", [(3, 4, 12, 12), (1, 4, 3, 12, 12)], ids=["images", "frames"])
def test_out_of_memory_of_one_batch_is_decoded_one_by_one(model: OneModel, shape: tuple[int, ...]) -> None:
    out_of_memory(model, lambda z: len(z) == 1)
    z = latents(*shape)
    answer = model.post(z)
    assert (answer.status_code, model.events) == (200, {"out_of_memory": 1})
    images = z if z.ndim == 4 else z[0].transpose(0, 1)
    with torch.inference_mode():
        expected = torch.cat([tiny_vae("sd").decode(one[None]).sample for one in images])
    pixels = pixels_of(answer)
    assert torch.equal(pixels if z.ndim == 4 else pixels[0].transpose(0, 1), expected)


def test_requests_that_ran_as_one_batch_and_out_of_memory_are_all_answered(folder: Path) -> None:
    model = OneModel(folder, batching="auto")
    out_of_memory(model, lambda z: len(z) == 1)

    results = model.together([one[None] for one in latents(6, 4, 12, 12)])
    model.close()
    assert model.events == {"out_of_memory": 1}
    for one, result in zip(latents(6, 4, 12, 12), results, strict=True):
        with torch.inference_mode():
            assert torch.equal(to_torch(result.tensor), tiny_vae("sd").decode(one[None]).sample)


def test_of_requests_that_ran_as_one_batch_only_those_that_took_tiles_say_so(folder: Path) -> None:
    model = OneModel(folder, batching="auto")
    first, left, heavy, right = (factor * latents(*LARGE) for factor in (1, 1, 50, 1))
    sizes: list[int] = []

    def hook(_: Any, given: tuple[torch.Tensor]) -> None:
        sizes.append(len(given[0]))
        if given[0].abs().max() > 50 and given[0].shape[-2] > 32:
            cuda_error()

    model.engine._model(torch.float32).decoder.register_forward_pre_hook(hook)

    results = model.together([first, left, heavy, right])
    model.close()
    assert sizes[:5] == [4, 1, 1, 1, 1]
    assert [result.provenance.tiling for result in results] == ["", "", "256", ""]
    with torch.inference_mode():
        assert torch.equal(to_torch(results[1].tensor), tiny_vae("sd").decode(left).sample)


@pytest.mark.parametrize("fail", ERRORS)
def test_an_encode_out_of_memory_is_a_503_and_the_replica_lives_on(model: OneModel, fail: Callable[[], None]) -> None:
    hook = model.engine._model(torch.float32).encoder.register_forward_pre_hook(lambda *_: fail())
    with pytest.raises(Unavailable, match="Out of memory"):
        model.engine.encode(latents(1, 3, 32, 32))
    hook.remove()
    assert model.engine.encode(latents(1, 3, 32, 32)).latents.shape == (1, 4, 4, 4)


def test_a_group_is_no_larger_than_what_fits(model: OneModel, folder: Path) -> None:
    model = OneModel(folder, batching="auto")
    told = model.engine.planner.estimator(torch.float32)
    for batch in (1, 3, 5):
        model.set_free(told.decode((batch, *SMALL[1:]), UNTILED))
        assert model.engine.batch_limit(SMALL, UNTILED) == batch
    model.set_free(GIB)
    assert model.engine.batch_limit(SMALL, UNTILED) == 8
    model.close()


def test_tiles_and_whole_decodes_at_once_do_not_meet(model: OneModel) -> None:
    vae = model.engine._model(torch.float32)
    z = latents(*LARGE)
    expected = {plan: model.engine.decode(z, plan).pixels for plan in (UNTILED, TILED)}
    assert not torch.equal(expected[UNTILED], expected[TILED])
    wrong: list[TilingPlan] = []

    def again(plan: TilingPlan) -> None:
        for _ in range(4):
            if not torch.equal(model.engine.decode(z, plan).pixels, expected[plan]) or vae.use_tiling:
                wrong.append(plan)

    threads = [threading.Thread(target=again, args=(plan,)) for plan in (UNTILED, TILED, UNTILED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, vae.use_tiling) == ([], False)
