"""What every family's work takes, whole and in tiles, held against the live bytes of a real run of its tiny module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import images, video
from families.case import Case
from families.shown import classes
from remote_vae_serve.engine.memory.estimate import LiveBytes, MemoryEstimator, on_meta
from remote_vae_serve.engine.operation import ENCODE, Operation, run_of
from remote_vae_serve.engine.tiling import ONE_BY_ONE, UNTILED, TilingPlan, view
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.layouts import RequestHints
from remote_vae_serve.families.table import FAMILIES, latent_space_of
from samples import latents

CASES = {case.class_name: case for case in reversed((*images.CASES, *video.CASES)) if "codes" not in case.name}
# Its attention runs neither on the meta device nor under the counter: nothing is known, and 0 says so.
UNKNOWN = {"LTX2VideoDiffusionDecoderModel"}
TILED = [name for row in FAMILIES if row.tile for name in row.classes]
FRAMES = {"AutoencoderKLAllegro": 6, "AutoencoderKLMiniMaxH3": 3, "AutoencoderVidTok": 4}
FRAMES_OF_PIXELS = {"AutoencoderKLAllegro": 24, "AutoencoderKLMiniMaxH3": 17, "AutoencoderKLQwenImage21": 1}
SMALL = TilingPlan(64)

pytestmark = pytest.mark.usefixtures("quiet")


def module_and_space(case: Case) -> tuple[Any, LatentSpace]:
    module = case.build()
    return module, latent_space_of(case.class_name, dict(module.config), module).with_statistics_of(module)


def forecast_of(module: Any, space: LatentSpace) -> MemoryEstimator:
    return MemoryEstimator(on_meta(type(module), dict(module.config), torch.float32), space)


def decode_of(space: LatentSpace) -> Operation:
    """A seed is left out: the tensor of a generator's state would be counted."""
    step = 0.05 if space.option("timestep_conditioning") else None
    return Operation("decode", RequestHints(decode_timestep=step))


def shape_of(space: LatentSpace, height: int, width: int) -> tuple[int, ...]:
    of_time = space.family.takes_time or space.family.media == "video"
    frames = FRAMES.get(space.class_name, 2 if space.family.media == "video" else 1)
    return (1, space.channels, *((frames,) if of_time else ()), height, width)


def live_bytes(work: Operation, model: Any, space: LatentSpace, given: torch.Tensor) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        run_of(work, model, space, torch.float32)(given)
    return int(given.nbytes + live.peak)


@pytest.mark.parametrize("name", classes(set(CASES) - UNKNOWN))
def test_a_decode_takes_what_was_forecast(name: str) -> None:
    module, space = module_and_space(CASES[name])
    told, work, shape = forecast_of(module, space), decode_of(space), shape_of(space, 4, 4)
    taken = live_bytes(work, module, space, latents(*shape))
    assert 0.95 * taken <= told.of(work, shape, UNTILED) <= 1.2 * taken
    several = (2, *shape[1:])
    assert told.of(work, several, ONE_BY_ONE) >= 0.95 * taken


@pytest.mark.parametrize("name", classes(set(CASES) - UNKNOWN))
def test_an_encode_takes_what_was_forecast(name: str) -> None:
    module, space = module_and_space(CASES[name])
    frames = FRAMES_OF_PIXELS.get(name, 1 + (space.temporal_ratio or 0))
    edges = 4 * space.ratio, 4 * space.ratio
    shape = (1, space.pixel_channels, *((frames,) if space.family.takes_time else ()), *edges)
    taken = live_bytes(ENCODE, module, space, latents(*shape))
    assert 0.95 * taken <= forecast_of(module, space).encode(shape) <= 1.2 * taken


def test_of_attention_that_only_devices_have_nothing_is_known_and_nothing_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in UNKNOWN:
        module, space = module_and_space(CASES[name])
        assert forecast_of(module, space).of(decode_of(space), shape_of(space, 4, 4), UNTILED) == 0
        assert name in caplog.text


@pytest.mark.parametrize("name", classes(TILED))
def test_tiles_make_the_same_shape_within_the_forecast_and_leave_the_module_alone(name: str) -> None:
    module, space = module_and_space(CASES[name])
    work, shape = decode_of(space), shape_of(space, 4, 3 * 64 // space.ratio)
    seen, z = view(module, SMALL, space.family.tile, space.ratio), latents(*shape)
    before = {key: value for key, value in vars(module).items() if "til" in key or "use_" in key}
    calls: list[Any] = []
    hook = module.decoder.register_forward_hook(lambda *called: calls.append(None))
    with torch.inference_mode():
        torch.manual_seed(0)
        whole = run_of(work, module, space, torch.float32)(z)
        of_whole = len(calls)
        in_tiles = run_of(work, seen, space, torch.float32)(z)
        of_tiles = len(calls) - of_whole
        torch.manual_seed(0)
        again = run_of(work, module, space, torch.float32)(z)
    hook.remove()
    assert of_tiles > of_whole
    assert of_tiles >= 3
    assert in_tiles.shape == whole.shape
    assert {key: value for key, value in vars(module).items() if "til" in key or "use_" in key} == before
    if not space.option("timestep_conditioning"):  # whose noise is drawn anew
        assert torch.equal(again, whole)
    taken = live_bytes(work, seen, space, z)
    assert 0.95 * taken <= forecast_of(module, space).of(work, shape, SMALL) <= 1.2 * taken


@pytest.mark.parametrize("name", [pytest.param("AutoencoderKLWan", marks=pytest.mark.slow), "AutoencoderKLCogVideoX",
                                  pytest.param("AutoencoderKLQwenImage", marks=pytest.mark.slow)])  # fmt: skip
def test_tiles_that_hand_features_on_are_counted_once_for_each_shape(name: str) -> None:
    """From frame to frame, in a list or in what the decoder gives back."""
    module, space = module_and_space(CASES[name])
    told, work = forecast_of(module, space), decode_of(space)
    runs: list[None] = []
    told._model.decoder.conv_in.register_forward_hook(lambda *called: runs.append(None))
    few = told.of(work, shape_of(space, 24, 24), SMALL)
    of_few = len(runs)
    many = told.of(work, shape_of(space, 48, 48), SMALL)
    assert len(runs) - of_few <= of_few + 4
    assert 0 < few < many
