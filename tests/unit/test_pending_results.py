"""What leaves the device: exact to the bit, made in little memory, and counted for as long as it is there."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from house import until
from limits import WAIT_S
from one_model import OneModel
from remote_vae.errors import Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae_serve.codecs import codecs
from remote_vae_serve.engine.memory import pending_results
from remote_vae_serve.engine.memory.estimate import LiveBytes
from remote_vae_serve.engine.memory.pending_results import PendingResults
from remote_vae_serve.engine.tiling import UNTILED
from remote_vae_serve.processing import postprocess
from remote_vae_serve.processing.postprocess import to_output
from samples import latents, save_tiny_vae

LARGE = (1, 4, 40, 36)
LARGE_PIXELS = 3 * 320 * 288 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (1, 3, 40, 11), (1, 3, 5, 7, 9), (1, 3, 2, 40, 11)], ids=str)
@pytest.mark.parametrize("piece", [1, 50, 3 * 7 * 9, 400, 2**22])
def test_what_leaves_piece_by_piece_is_what_the_pipelines_image_processor_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(postprocess, "PIECE", piece)
    pixels = latents(*shape).to(dtype)
    before = pixels.clone()
    frames = pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels
    theirs = np.stack([np.asarray(one) for one in VaeImageProcessor().postprocess(frames, output_type="pil")])
    np.testing.assert_array_equal(to_output(pixels, Output.UINT8).numpy(), theirs)
    unit = to_output(pixels, Output.UNIT)
    assert torch.equal(unit, VaeImageProcessor().postprocess(frames, output_type="pt"))
    assert unit.is_contiguous()
    assert torch.equal(pixels, before)


def test_bytes_are_made_in_a_piece_of_memory_and_floats_in_one_copy() -> None:
    pixels = latents(1, 3, 8, 1024, 768)
    with LiveBytes() as live:
        to_output(pixels, Output.UINT8)
    frame = 3 * 1024 * 768  # two are more than a piece
    assert live.peak == pixels.nbytes / 4 + 4 * frame
    with LiveBytes() as live:
        to_output(pixels, Output.UNIT)
    assert live.peak == pixels.nbytes


def test_a_pending_result_is_counted_once_and_until_it_is_gone() -> None:
    there, result = PendingResults(), torch.zeros(4, 100)
    for part in (result, result[0], result[1:].view(-1)):
        there.put(part)
    assert there.held == 1600
    array = result.numpy()
    there.put(torch.zeros(10, dtype=torch.uint8))  # gone at once
    del result, part
    gc.collect()
    assert there.held == 1600  # an array is left of it
    del array
    assert there.held == 0


def test_who_waits_goes_on_as_soon_as_there_is_room_and_at_once_where_nothing_is_in_the_way() -> None:
    there, results = PendingResults(), [torch.zeros(1000, dtype=torch.uint8) for _ in range(3)]
    there.wait(-5)  # more was learned since it was planned; nobody else is to blame
    for result in results:
        there.put(result)
    there.wait(3000)
    gone_on = threading.Event()
    waiting = threading.Thread(target=lambda: (there.wait(1500), gone_on.set()))
    waiting.start()
    del result
    results.pop()
    assert not gone_on.wait(0.1)
    results.pop()
    assert gone_on.wait(WAIT_S)
    waiting.join()


def test_who_waits_for_too_long_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_results, "CLIENT_WAIT_S", 0.05)
    there, result = PendingResults(), torch.zeros(3 * 2**20, dtype=torch.uint8)
    there.put(result)
    with pytest.raises(Unavailable, match="hold 3 MiB") as caught:
        there.wait(2**20)
    assert caught.value.retry_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def model(folder: Path) -> Iterator[OneModel]:
    model = OneModel(folder)
    yield model
    model.close()


def test_a_decode_waits_for_results_that_it_would_not_fit_beside_and_the_budget_is_kept(
    model: OneModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.set_free(model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED) + LARGE_PIXELS // 4 - 1)
    go_on, writing, decoded = threading.Event(), threading.Event(), 0
    write = codecs.write

    def slowly(*arguments: Any) -> Any:
        writing.set()
        assert go_on.wait(WAIT_S)
        return write(*arguments)

    def count(*_: Any) -> None:
        nonlocal decoded
        decoded += 1

    monkeypatch.setattr(codecs, "write", slowly)
    model.engine._model(torch.float32).decoder.register_forward_pre_hook(count)

    async def three() -> list[str]:
        asked = [DecodeRequest(from_array(latents(*LARGE)), output=Output.JPEG) for _ in range(3)]
        tasks = [asyncio.create_task(model.pipeline.decode(one)) for one in asked]
        assert await asyncio.to_thread(writing.wait, WAIT_S)
        await asyncio.sleep(0.3)
        assert decoded == 1  # the next does not fit beside the result that is being written
        go_on.set()
        return [result.media_type for result in await asyncio.gather(*tasks)]

    assert asyncio.run(three()) == ["image/jpeg"] * 3
    assert model.live.peak <= model.engine.planner.free
    assert decoded == 3


def test_where_there_is_room_nobody_waits_for_a_writer(model: OneModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_free(model.engine.planner.estimator(torch.float32).decode(LARGE, UNTILED) + 3 * LARGE_PIXELS)
    go_on = threading.Event()
    write = codecs.write
    monkeypatch.setattr(codecs, "write", lambda *arguments: (go_on.wait(WAIT_S), write(*arguments))[1])

    async def three() -> float:
        asked = [DecodeRequest(from_array(latents(*LARGE)), output=Output.JPEG) for _ in range(3)]
        tasks = [asyncio.create_task(model.pipeline.decode(one)) for one in asked]
        began = time.monotonic()
        while model.pipeline._worker.wait_s() or model.pipeline._engine.pending.held < 3 * LARGE_PIXELS / 4:
            assert time.monotonic() < began + WAIT_S / 2
            await asyncio.sleep(0.01)
        go_on.set()
        return len(await asyncio.gather(*tasks))

    assert asyncio.run(three()) == 3
    until(lambda: model.pipeline._engine.pending.held == 0)  # a writer's thread forgets its work just after it is done
