"""The forecast of memory, held against real decodes and encodes of real channel widths: the bytes of live tensors are those."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderTiny

from fresh_process import printed_by
from remote_vae.protocol.output import Output
from remote_vae_serve.engine.memory import estimate
from remote_vae_serve.engine.memory.estimate import LiveBytes, MemoryEstimator, on_meta, peak_bytes
from remote_vae_serve.engine.operation import DECODE, ENCODE, one_by_one, run_of
from remote_vae_serve.engine.tiling import ONE_BY_ONE, UNTILED, TilingPlan, view
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.table import GENERIC, latent_space_of
from remote_vae_serve.processing import postprocess
from remote_vae_serve.processing.postprocess import to_output
from samples import KINDS, tiny_vae

MIB = 2**20
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
WITHOUT_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
REAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (AutoencoderKL, KL | {"latent_channels": 4}),
    "flux": (AutoencoderKL, KL | WITHOUT_QUANT),
    "tiny": (AutoencoderTiny, {}),
    "hunyuan": (AutoencoderKLHunyuanVideo, {}),
}
"""Of the widths that are published; SDXL's graph is SD's and SD3's is Flux's: only numbers in their configs differ."""
CHANNELS = {"sd": 4, "flux": 16, "tiny": 4, "hunyuan": 16}
TILED = TilingPlan(256)

slow = pytest.mark.slow  # decoders of their real width

DECODES: dict[str, list[tuple[tuple[int, ...], TilingPlan]]] = {
    "sd": [((1, 8, 8), UNTILED), ((2, 4, 8), UNTILED), ((1, 8, 12), UNTILED), ((1, 1, 60), TILED)],
    "flux": [((1, 4, 4), UNTILED), ((2, 4, 4), UNTILED), ((1, 8, 6), UNTILED), ((1, 1, 36), TILED)],
    "tiny": [
        ((1, 8, 8), UNTILED),
        ((2, 8, 16), UNTILED),
        ((1, 16, 24), UNTILED),
        ((1, 1, 160), TILED),
        ((1, 2, 34), TILED),
    ],
    "hunyuan": [((1, 1, 4, 4), UNTILED), ((1, 2, 2, 4), UNTILED), ((1, 3, 2, 2), UNTILED), ((1, 1, 1, 34), TILED)],
}
ENCODES: dict[str, list[tuple[int, ...]]] = {
    "sd": [(1, 3, 64, 64), (2, 3, 32, 64), (1, 3, 96, 64)],
    "flux": [(1, 3, 64, 64)],
    "tiny": [(1, 3, 64, 64), (2, 3, 64, 96), (1, 3, 128, 128)],
    "hunyuan": [(1, 3, 1, 32, 32), (1, 3, 5, 16, 32), (1, 3, 9, 16, 16)],
}


@pytest.fixture(scope="module", autouse=True)
def forget_the_models() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()  # it calls `to(bfloat16)` of a model doubtful
    yield
    diffusers.logging.set_verbosity_warning()
    model_of.cache_clear()
    gc.collect()


@lru_cache(1)
def model_of(kind: str, dtype: torch.dtype) -> Any:
    """With weights of zero: what is counted does not depend on them, and chance takes seconds."""
    model_class, config = REAL[kind]
    model = on_meta(model_class, config, dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def space_of(kind: str) -> LatentSpace:
    model_class, config = REAL[kind]
    model, defaults = on_meta(model_class, config, torch.float32), {"scaling_factor": 1.0}
    tiny = {"upsampling_scaling_factor": 2, "decoder_block_out_channels": (64,) * 4}
    space = latent_space_of(model_class.__name__, {"latent_channels": 4} | tiny | defaults | config, model)
    assert space.ratio == 8
    return space


def forecast_of(kind: str, dtype: torch.dtype = torch.float32) -> MemoryEstimator:
    model_class, config = REAL[kind]
    return MemoryEstimator(on_meta(model_class, config, dtype), space_of(kind))


def live_bytes(run: Any, *shape: int, dtype: torch.dtype) -> int:
    """At the peak of really running that, what goes in included."""
    with torch.inference_mode(), LiveBytes() as live:
        run(torch.zeros(shape, dtype=dtype))
    return int(live.peak)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize("kind", ["sd", "tiny", *(pytest.param(kind, marks=slow) for kind in ("flux", "hunyuan"))])
def test_every_family_takes_what_was_forecast_to_the_byte(kind: str, dtype: torch.dtype) -> None:
    told, model, tile = forecast_of(kind, dtype), model_of(kind, dtype), space_of(kind).family.tile
    assert told.weights == sum(parameter.nbytes for parameter in model.parameters())
    half = dtype is torch.bfloat16  # slow on a CPU
    for (batch, *sizes), plan in DECODES[kind][half * 2 :]:
        shape = (batch, CHANNELS[kind], *sizes)
        taken = live_bytes(view(model, plan, tile, 8).decode, *shape, dtype=dtype)
        assert told.decode(shape, plan) == taken, (shape, plan)
    for shape in ENCODES[kind][: 1 if half else None]:
        assert told.encode(shape) == live_bytes(model.encode, *shape, dtype=dtype), shape


@pytest.mark.parametrize(
    ("kind", "sizes", "tile"),
    [("sd", (2, 40, 49), 256), ("tiny", (2, 130, 97), 256),
     *(pytest.param(*case, marks=slow) for case in (("sd", (1, 97, 130), 256), ("sd", (1, 100, 60), 384),
                                                   ("hunyuan", (1, 6, 40, 56), 256)))],
)  # fmt: skip
def test_a_tile_that_is_like_another_is_not_run_again_and_nothing_is_missed(
    kind: str, sizes: tuple[int, ...], tile: int
) -> None:
    (batch, *rest), told = sizes, forecast_of(kind)
    shape, seen = (batch, CHANNELS[kind], *rest), view(told._model, TilingPlan(tile), told._space.family.tile, 8)
    assert told.decode(shape, TilingPlan(tile)) == peak_bytes(lambda: seen.decode(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(
    ("kind", "sizes", "tile"),
    [pytest.param("sd", (1, 520, 776), 256, marks=slow), ("sd", (2, 320, 392), 256), ("tiny", (2, 1040, 776), 256),
     pytest.param("hunyuan", (1, 5, 320, 448), 256, marks=slow)],
)  # fmt: skip
def test_an_encode_in_tiles_is_counted_in_the_same_way(kind: str, sizes: tuple[int, ...], tile: int) -> None:
    (batch, *rest), told = sizes, forecast_of(kind)
    shape, seen = (batch, 3, *rest), view(told._model, TilingPlan(tile), told._space.family.tile, 8)
    counted = told.encode(shape, TilingPlan(tile))
    assert counted == peak_bytes(lambda: seen.encode(torch.empty(shape, device="meta")))
    assert counted < told.encode(shape)


def test_an_encode_in_tiles_takes_what_was_forecast_to_the_byte() -> None:
    for kind, shape in (("tiny", (1, 3, 264, 392)), ("sd", (1, 3, 8, 320))):
        told, seen = forecast_of(kind), view(model_of(kind, torch.float32), TILED, space_of(kind).family.tile, 8)
        assert told.encode(shape, TILED) == live_bytes(seen.encode, *shape, dtype=torch.float32)


def test_of_an_encode_in_very_many_tiles_a_part_of_whole_latents_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 3, 1608, 1208)
    all_of_them = forecast_of("sd").encode(shape, TILED)
    monkeypatch.setattr(estimate, "MOST_TILES", 7)
    assert 0.95 * all_of_them <= forecast_of("sd").encode(shape, TILED) <= 8 * all_of_them


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize(
    ("kind", "sizes", "plan"),
    [("tiny", (3, 8, 16), ONE_BY_ONE), ("tiny", (2, 2, 34), TilingPlan(256, one_by_one=True)), ("sd", (5, 2, 2), ONE_BY_ONE),
     ("hunyuan", (3, 1, 2, 2), ONE_BY_ONE)],
)  # fmt: skip
def test_samples_one_by_one_take_what_was_forecast_to_the_byte(
    kind: str, sizes: tuple[int, ...], plan: TilingPlan, dtype: torch.dtype
) -> None:
    (batch, *rest), told, model = sizes, forecast_of(kind, dtype), model_of(kind, dtype)
    shape, seen = (batch, CHANNELS[kind], *rest), view(model, plan, space_of(kind).family.tile, 8)
    taken = live_bytes(partial(one_by_one, run_of(DECODE, seen, space_of(kind), dtype)), *shape, dtype=dtype)
    assert told.decode(shape, plan) == taken < told.decode(shape, UNTILED) or plan.tile
    pixels = (batch, 3, *rest[:-2], 8 * rest[-2], 8 * rest[-1])
    taken = live_bytes(partial(one_by_one, run_of(ENCODE, seen, space_of(kind), dtype)), *pixels, dtype=dtype)
    assert told.encode(pixels, plan) == taken


@pytest.mark.parametrize("output", [Output.PT, Output.UNIT, Output.UINT8])
@pytest.mark.parametrize("wanted", [torch.float32, pytest.param(torch.bfloat16, marks=slow)], ids=str)
@pytest.mark.parametrize(
    ("kind", "sizes", "plan"),
    [("sd", (1, 8, 12), UNTILED), ("tiny", (1, 8, 12), UNTILED), ("tiny", (1, 4, 400), TILED),
     pytest.param("tiny", (48, 4, 8), ONE_BY_ONE, marks=slow), ("hunyuan", (1, 3, 2, 2), UNTILED)],
)  # fmt: skip
def test_the_form_in_which_pixels_leave_is_counted_too(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sizes: tuple[int, ...],
    plan: TilingPlan,
    wanted: torch.dtype,
    output: Output,
) -> None:
    """Of small decoders the pixels are a large part; and those of a batch are there when its last sample is decoded."""
    monkeypatch.setattr(postprocess, "PIECE", 2**12)
    (batch, *rest), (model_class, config) = sizes, REAL[kind]
    told = MemoryEstimator(on_meta(model_class, config, torch.float32), space_of(kind), wanted)
    shape, seen = (
        (batch, CHANNELS[kind], *rest),
        view(model_of(kind, torch.float32), plan, space_of(kind).family.tile, 8),
    )
    run = run_of(DECODE, seen, space_of(kind), wanted)

    def path(z: torch.Tensor) -> torch.Tensor:
        pixels = one_by_one(run, z) if plan.one_by_one else run(z)
        del z
        return to_output(pixels, output)

    taken = live_bytes(path, *shape, dtype=torch.float32)
    assert 0.8 * told.decode(shape, plan) <= taken <= told.decode(shape, plan)


def test_where_pixels_are_more_than_what_made_them_their_leaving_is_the_peak() -> None:
    """Many samples one by one: of a small decoder, whose work on one is less than what becomes of them all."""
    told, shape = forecast_of("tiny"), (150, 4, 1, 2)
    run = run_of(DECODE, model_of("tiny", torch.float32), space_of("tiny"), torch.float32)
    decoded = live_bytes(partial(one_by_one, run), *shape, dtype=torch.float32)
    left = live_bytes(lambda z: to_output(one_by_one(run, z), Output.UINT8), *shape, dtype=torch.float32)
    assert told.decode(shape, ONE_BY_ONE) == left - torch.zeros(shape).nbytes > decoded


@pytest.mark.parametrize(("kind", "sizes"), [("tiny", (1, 300, 200)), pytest.param("sd", (1, 200, 300), marks=slow),
                                              pytest.param("sd", (1, 4, 3000), marks=slow)])  # fmt: skip
def test_of_very_many_tiles_a_part_is_counted_and_the_whole_is_never_under(
    monkeypatch: pytest.MonkeyPatch, kind: str, sizes: tuple[int, ...]
) -> None:
    """With few, that can be counted all: the decoder's own share, which is counted too often, is larger than it ever is."""
    (batch, *rest), exact = sizes, forecast_of(kind)
    shape = (batch, CHANNELS[kind], *rest)
    all_of_them = exact.decode(shape, TILED)
    monkeypatch.setattr(estimate, "MOST_TILES", 48)
    assert 0.95 * all_of_them <= forecast_of(kind).decode(shape, TILED) <= 2 * all_of_them


@slow
def test_a_picture_beyond_all_measure_is_forecast_in_seconds_and_not_much_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 4, 2000, 2000)
    part = forecast_of("sd").decode(shape, TILED)
    monkeypatch.setattr(estimate, "MOST_TILES", 10**9)
    assert 0.95 <= part / forecast_of("sd").decode(shape, TILED) <= 1.2


@slow
def test_the_process_itself_takes_little_more_than_was_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    """What libraries take on top. A fresh process: its high water mark is of this one decode."""
    size = 24
    script = f"""
import torch
from test_memory_estimate import forecast_of, model_of
def mark(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
torch.set_num_threads(2)
model, told = model_of("sd", torch.float32), forecast_of("sd")
from remote_vae_serve.engine.tiling import UNTILED
before = mark("VmRSS")
with torch.inference_mode():
    model.decode(torch.zeros(1, 4, {size}, {size}))
print(told.decode((1, 4, {size}, {size}), UNTILED), mark("VmHWM") - before)
"""
    predicted, grown = map(int, printed_by(script, environment=os.environ | {"MALLOC_ARENA_MAX": "1"}).split())
    with capsys.disabled():
        print(f"\nSD, {8 * size} px: forecast {predicted / MIB:.0f} MiB, the process grew by {grown / MIB:.0f} MiB")
    assert 0.8 * predicted < grown < 1.6 * predicted + 128 * MIB


def test_a_family_without_tiling_is_forecast_whole_whatever_the_plan() -> None:
    told = MemoryEstimator(
        on_meta(AutoencoderKL, KL, torch.float32), GENERIC.space("AutoencoderKL", {"latent_channels": 4, **KL})
    )
    assert told.decode((1, 4, 48, 48), TILED) == told.decode((1, 4, 48, 48), UNTILED)


def test_of_a_graph_that_asks_for_values_nothing_is_known_and_nothing_is_learned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Asking(torch.nn.Conv2d):
        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z if z.sum().item() > 0 else -z

    told = MemoryEstimator(Asking(4, 4, 1, device="meta"), GENERIC.space("Asking", {"latent_channels": 4}))
    assert told.decode((1, 4, 8, 8), UNTILED) == 0
    assert "Asking" in caplog.text
    told.learn(0, 2**40)
    assert told._excess == 1


def test_live_bytes_are_those_that_operations_made_and_that_are_still_there() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        kept = given + 1
        (given.view(10, 100).t() + 1)[:5]  # given back at once
        assert (live.now, live.peak) == (4000, 8000)
        halves = given[:500], kept.split(500)
        given.add_(1)
        assert (live.now, live.peak) == (4000, 8000)
        del kept
        assert live.now == 4000  # a view keeps it
        del halves
        assert live.now == 0


def test_what_is_forecast_is_not_forecast_again_and_what_is_remembered_is_bounded() -> None:
    told = forecast_of("tiny")
    for size in range(8, 12):
        for _ in range(3):
            told.decode((1, 4, size, 8), UNTILED)
            told.encode((1, 3, 8 * size, 64))
    known = told._counted.cache_info()
    assert (known.misses, known.hits, known.maxsize) == (8, 16, 2048)


def test_what_is_known_is_told_while_another_shape_is_being_counted() -> None:
    told = forecast_of("tiny")
    known = told.decode((1, 4, 8, 8), UNTILED)
    with told._running:  # as another thread holds it, for seconds where the model is a large one of video
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(told.decode((1, 4, 8, 8), UNTILED)))
        asking.start()
        asking.join(5)
        assert answers == [known]


def test_threads_that_ask_at_once_get_what_one_alone_gets() -> None:
    shapes = [((1, 4, 8 + 5 * number, 40), plan) for number in range(6) for plan in (UNTILED, TILED)]
    alone, together = forecast_of("tiny"), forecast_of("tiny")
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        turned = shapes[number:] + shapes[:number]
        told = [together.decode(*shape) for shape in turned]
        answers[number] = told[len(shapes) - number :] + told[: len(shapes) - number]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [alone.decode(*shape) for shape in shapes]
    assert list(answers.values()) == [expected] * 4


def test_it_learns_what_was_taken_beyond_the_workspace_that_small_work_takes_too() -> None:
    told, shape = forecast_of("tiny"), (1, 4, 128, 128)
    first = told.decode(shape, UNTILED)
    told.learn(first, first + estimate.WORKSPACE)
    told.learn(10, 200 * MIB)  # twenty million times as much as was forecast, of a picture of one pixel
    assert told.decode(shape, UNTILED) == first
    told.learn(first, int(1.5 * first) + estimate.WORKSPACE)
    assert told.decode(shape, UNTILED) == pytest.approx(1.5 * first, rel=1e-6)
    told.learn(told.decode(shape, UNTILED), first)  # less, for once, teaches nothing
    assert told.decode(shape, UNTILED) == pytest.approx(1.5 * first, rel=1e-6)
    told.learn(1, 2**50)
    assert told.decode(shape, UNTILED) == pytest.approx(estimate.MOST_EXCESS * first, rel=1e-6)


def test_a_failure_teaches_by_a_step_and_never_without_end() -> None:
    told, shape = forecast_of("tiny"), (1, 4, 32, 32)
    first = told.decode(shape, UNTILED)
    told.learn_of_failure()
    assert told.decode(shape, UNTILED) == pytest.approx(1.1 * first, rel=1e-6)
    for _ in range(100):
        told.learn_of_failure()
    assert told.decode(shape, UNTILED) == pytest.approx(1.5 * first, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_in_tiles_leaves_the_switches_of_the_model_alone_and_shares_its_weights(kind: str) -> None:
    vae = tiny_vae(kind)
    before = {name: value for name, value in vars(vae).items() if "til" in name or "use_" in name}
    seen = view(vae, TILED, latent_space_of(type(vae).__name__, dict(vae.config), vae).family.tile, 8)
    assert (seen.use_tiling, vae.use_tiling) == (True, False)
    assert {name: value for name, value in vars(vae).items() if "til" in name or "use_" in name} == before
    assert [*map(id, seen.parameters())] == [*map(id, vae.parameters())]
    assert view(vae, UNTILED, None, 8) is vae
