"""What a family cannot take is refused with a sentence, before the device; what is not refused is decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from families import images, video
from families.case import Case
from families.shown import classes
from in_process import diffusers_engine
from remote_vae.errors import BadRequest
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.families.checks import ALLEGRO_FRAMES, ALLEGRO_OVERLAPS
from remote_vae_serve.families.table import FAMILIES
from remote_vae_serve.processing.latent_processor import Unpacked
from samples import latents

CASES = {case.name: case for case in reversed((*images.CASES, *video.CASES))}
CLASSES = {case.class_name: case for case in CASES.values()} | {
    "AutoencoderKLLTXVideo": CASES["AutoencoderKLLTXVideo: 0.9.1"]
}
OWN = Scaling(own=True)
SIZES = ((1, 1), (1, 2), (3, 2))
FRAMES = (1, 2, 3, 6)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),  # diffusers does
    pytest.mark.usefixtures("quiet"),
]
each_class = pytest.mark.parametrize("name", classes(CLASSES))


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], DiffusersEngine]:
    @cache
    def engine(case_name: str) -> DiffusersEngine:
        folder = tmp_path_factory.mktemp("weights")
        CASES[case_name].build().save_pretrained(folder)
        return diffusers_engine(folder)

    return lambda case: engine(case.name)


def hints_of(engine: DiffusersEngine) -> Hints:
    """What a human has to say."""
    said: dict[str, Any] = {"sigma_data": 0.5, "decode_timestep": 0.05, "seed": 3}
    return Hints(**{name: value for name, value in said.items() if name in (*engine.space.takes, "seed")})


def request(z: torch.Tensor, **arguments: Any) -> DecodeRequest:
    return DecodeRequest(from_array(z), **{"scaling": OWN, "output": Output.PT} | arguments)


def unpacked_by(engine: DiffusersEngine, request: DecodeRequest) -> Unpacked:
    """What the host does with a request before the device sees it: it unpacks the latents and plans their decode."""
    unpacked = engine.processor.unpack_latents(request)
    engine.plan_decode(tuple(unpacked.latents.shape), unpacked.hints)
    return unpacked


def refusal(engine: DiffusersEngine, z: torch.Tensor, **arguments: Any) -> BadRequest:
    """On the host: no decoder has seen the latents."""
    with pytest.raises(BadRequest) as caught:
        unpacked_by(engine, request(z, **arguments))
    return caught.value


def decoded(engine: DiffusersEngine, z: torch.Tensor) -> torch.Tensor:
    unpacked = unpacked_by(engine, request(z, hints=hints_of(engine)))
    return pixels_of(engine, unpacked)


def pixels_of(engine: DiffusersEngine, unpacked: Unpacked) -> torch.Tensor:
    plan = engine.plan_decode(tuple(unpacked.latents.shape), unpacked.hints)
    return engine.decode(unpacked.latents, plan, unpacked.hints).pixels


def shapes_of(engine: DiffusersEngine, frames: tuple[int, ...]) -> list[tuple[int, ...]]:
    space = engine.space
    of_time = space.family.takes_time or space.family.media == "video"
    if space.class_name == "AutoencoderKLHunyuanImageRefiner":
        return [(1, 2 * space.channels, 1, *size) for size in SIZES]
    if space.family.layouts[0].kind == "frames_first":
        return [(1, count, space.channels, *size) for count in frames for size in SIZES]
    return [(1, space.channels, *((count,) if of_time else ()), *size) for count in frames for size in SIZES]


def test_every_row_is_here() -> None:
    assert {name for row in FAMILIES for name in row.classes} == set(CLASSES)


@each_class
def test_another_number_of_channels_is_refused_with_the_class_and_what_it_takes(name: str, engine_of: Any) -> None:
    engine = engine_of(CLASSES[name])
    expected = 2 * engine.space.channels if "Refiner" in name else engine.space.channels
    for shape in ((1, 5, 4, 4), (1, 5, 5, 4, 5), (1, 5, 5, 2, 2, 2)):
        refused = refusal(engine, latents(*shape), hints=hints_of(engine))
        assert refused.parameter == "shape"
        assert name in refused.message
        assert f"{expected}" in refused.message


@each_class
def test_latents_of_no_form_that_it_has_are_refused_with_those_that_it_has(name: str, engine_of: Any) -> None:
    engine = engine_of(CLASSES[name])
    shape = (1, engine.space.channels)
    for wrong in (shape, (*shape, 2, 2, 2, 2)):
        refused = refusal(engine, latents(*wrong), hints=hints_of(engine))
        assert f"do not fit {name}" in refused.message
        assert "expected" in refused.message


@each_class
def test_nothing_is_refused_as_a_size(name: str, engine_of: Any) -> None:
    engine = engine_of(CLASSES[name])
    for shape in shapes_of(engine, (1, 2)):
        with pytest.raises(BadRequest):
            unpacked_by(engine, request(torch.zeros(*shape[:-1], 0)))


@each_class
def test_odd_sizes_are_decoded_or_refused_before_the_device_and_the_next_decode_is_right(
    name: str, engine_of: Any
) -> None:
    case, engine = CLASSES[name], engine_of(CLASSES[name])
    usual = case.latents(case.build())[:1]
    said = dict(case.parameters)
    sizes = {key: value for key, value in said.items() if key in ("height", "width")}
    hints = Hints(num_frames=said.get("num_frames")).or_else(hints_of(engine))
    ready = unpacked_by(engine, request(usual, hints=hints, **sizes))
    before = pixels_of(engine, ready)
    refused: list[str] = []
    for shape in shapes_of(engine, FRAMES):
        try:
            unpacked = unpacked_by(engine, request(latents(*shape), hints=hints_of(engine)))
        except BadRequest as error:
            refused.append(error.message)
            continue
        pixels = pixels_of(engine, unpacked)
        assert torch.isfinite(pixels).all()
        if name != "AutoencoderRAE":  # it makes one size of every square
            assert tuple(pixels.shape[-2:]) == tuple(engine.space.ratio * edge for edge in shape[-2:]), shape
    assert [message for message in refused if name not in message] == []
    assert torch.equal(pixels_of(engine, ready), before)


@each_class
def test_odd_sizes_are_encoded_or_refused_before_the_device(name: str, engine_of: Any) -> None:
    engine = engine_of(CLASSES[name])
    space, refused = engine.space, list[str]()
    for frames in (1, 2, 5) if space.family.takes_time else (None,):
        for height, width in SIZES:
            edges = (height * space.ratio, width * space.ratio)
            shape = (1, space.pixel_channels, *(() if frames is None else (frames,)), *edges)
            try:
                prepared = engine.processor.preprocess_image(EncodeRequest(from_array(latents(*shape).clamp(-1, 1))))
                engine.plan_encode(tuple(prepared.pixels.shape))
            except BadRequest as error:
                refused.append(error.message)
                continue
            made = engine.encode(prepared.pixels, SampleMode.ARGMAX).latents
            assert torch.isfinite(made).all()
    assert [message for message in refused if name not in message] == []


def test_what_a_module_says_of_a_shape_does_not_take_the_engine_down(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CLASSES["AutoencoderKLMagvit"]
    engine, z = engine_of(case), case.latents(case.build())[:1]
    before = decoded(engine, z)
    space = engine.space
    with pytest.raises((RuntimeError, ValueError)):
        engine.decode(latents(1, space.channels, 2, 1, 1))  # past the check
    assert torch.equal(decoded(engine, z), before)


# What only a human can say


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("AutoencoderKLLTXVideo: 0.9.1", "decode_timestep"), ("AutoencoderKLLTXVideo: 0.9.5", "decode_timestep"),
     ("AutoencoderKLCosmos", "sigma_data"), ("AutoencoderKLCosmos: without statistics", "sigma_data")],
)  # fmt: skip
def test_what_only_a_human_can_say_is_asked_for_by_name(name: str, parameter: str, engine_of: Any) -> None:
    case = CASES[name]
    engine = engine_of(case)
    shape = (1, engine.space.channels, 2, 2, 2)
    refused = refusal(engine, latents(*shape), hints=Hints(seed=3))
    assert refused.parameter == parameter
    assert case.class_name in refused.message
    assert f"{parameter}" in refused.message
    unpacked_by(engine, request(latents(*shape), hints=hints_of(engine)))


@pytest.mark.parametrize(
    ("name", "tokens", "width", "missing"),
    [("AutoencoderKL: Flux, packed", 6, 4, "height"), ("AutoencoderKLFlux2: Flux.2 dev, packed", 6, 4, "height"),
     ("AutoencoderKLQwenImage: packed", 6, 4, "width"), ("AutoencoderKLQwenImage21: packed", 6, 1, "height"),
     ("AutoencoderKLLTXVideo: 0.9.0", 6, 1, "height"), ("AutoencoderKLLTX2Video", 6, 1, "width")],
)  # fmt: skip
def test_packed_latents_without_a_size_are_refused_with_the_class(
    name: str, tokens: int, width: int, missing: str, engine_of: Any
) -> None:
    engine = engine_of(CASES[name])
    z = latents(1, tokens, width * engine.space.channels)
    given = {"height": {}, "width": {"height": 32}}[missing]
    refused = refusal(engine, z, hints=hints_of(engine), **given)
    assert refused.parameter == missing
    assert CASES[name].class_name in refused.message


def test_packed_videos_need_the_number_of_their_frames(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLLTX2Video"])
    z, size = latents(1, 12, engine.space.channels), {"height": 16, "width": 24}
    refused = refusal(engine, z, **size)
    assert refused.parameter == "num_frames"
    assert "AutoencoderKLLTX2Video" in refused.message
    unpacked_by(engine, request(z, hints=Hints(num_frames=9), **size))


def test_packed_layers_that_nobody_calls_layers_are_refused_with_the_word(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLQwenImage: Layered, packed"])
    z, size = latents(1, 18, 64), {"height": 32, "width": 48}
    refused = refusal(engine, z, **size)
    assert refused.parameter == "layers"
    assert "send layers" in refused.message
    assert len(unpacked_by(engine, request(z, hints=Hints(layers=2), **size)).latents) == 2


def test_several_layers_are_no_picture_and_the_refusal_says_what_to_ask_for(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLQwenImage: Layered, packed"])
    for output in (Output.PNG, Output.JPEG):
        refused = refusal(engine, latents(1, 18, 64), height=32, width=48, hints=Hints(layers=2), output=output)
        assert "output_type=pt with partial_postprocess=true" in refused.message


# What a decoder would spoil without a word


def test_vidtok_is_not_given_frames_that_it_would_drop(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderVidTok: fsq"])
    for frames in (1, 3, 5, 6):
        assert "multiples of 4" in refusal(engine, latents(1, 6, frames, 2, 2)).message
    unpacked_by(engine, request(latents(1, 6, 8, 2, 2)))
    causal = engine_of(CASES["AutoencoderVidTok: kl, causal"])
    unpacked_by(causal, request(latents(1, 4, 3, 2, 2)))


def test_allegro_is_not_given_what_its_tiles_leave_black(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLAllegro"])
    model = CASES["AutoencoderKLAllegro"].build()
    assert model.kernel[0] == ALLEGRO_FRAMES
    assert tuple(k - s for k, s in zip(model.kernel, model.stride, strict=True)) == ALLEGRO_OVERLAPS
    for frames in (1, 5, 7, 8, 9):
        refused = refusal(engine, latents(1, 4, frames, 4, 4))
        assert f"{frames} frames" in refused.message
        assert "6, 10, 14" in refused.message
        if frames > 6:
            with torch.inference_mode():
                black = model.decode(latents(1, 4, frames, 4, 4)).sample[:, -1]
            assert not black.any()  # as diffusers leaves it
    assert "rows" in refusal(engine, latents(1, 4, 6, 5, 4)).message
    assert "columns" in refusal(engine, latents(1, 4, 6, 4, 5)).message
    pixels = decoded(engine, latents(1, 4, 10, 4, 4))
    assert all(frame.any() for frame in pixels.transpose(0, 2))


def test_minimax_is_not_given_less_than_a_clip(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLMiniMaxH3"])
    for frames in (1, 2):
        assert "takes 3 at least" in refusal(engine, latents(1, 4, frames, 2, 2)).message
        with pytest.raises(ValueError, match="non-empty"), torch.inference_mode():
            CASES["AutoencoderKLMiniMaxH3"].build().decode(latents(1, 4, frames, 2, 2))
    assert decoded(engine, latents(1, 4, 3, 2, 2)).shape[2] == 9


def test_rae_takes_the_form_that_its_config_says(engine_of: Any) -> None:
    grid, tokens = engine_of(CASES["AutoencoderRAE"]), engine_of(CASES["AutoencoderRAE: tokens"])
    assert "squares" in refusal(grid, latents(1, 64, 4, 3)).message
    assert "[B, 64, h, w]" in refusal(grid, latents(1, 16, 64)).message
    assert "[B, N, 64]" in refusal(tokens, latents(1, 64, 4, 4)).message
    assert "no square" in refusal(tokens, latents(1, 15, 64)).message


def test_a_neighbourhood_that_is_larger_than_the_latents_is_named(engine_of: Any) -> None:
    case = CLASSES["LTX2VideoDiffusionDecoderModel"]
    engine = engine_of(case)
    channels = engine.space.channels
    for sizes in ((1, 4, 4), (2, 2, 4), (2, 4, 2)):
        refused = refusal(engine, latents(1, channels, *sizes))
        assert "2 x 3 x 3 at least" in refused.message
        with pytest.raises(ValueError, match="at least its kernel size"), torch.inference_mode():
            case.build().decode(latents(1, channels, *sizes))


def test_cosmos_has_statistics_for_so_many_frames(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLCosmos"])
    refused = refusal(engine, latents(1, 4, 17, 2, 2), hints=Hints(sigma_data=0.5))
    assert "17 frames" in refused.message
    assert "16 at most" in refused.message


def test_latents_of_flux2_have_even_sizes_where_patches_are_denormalized(engine_of: Any) -> None:
    engine = engine_of(CASES["AutoencoderKLFlux2: Flux.2 dev, packed"])
    refused = refusal(engine, latents(1, 32, 3, 4))
    assert "3 x 4" in refused.message
    assert "even" in refused.message
    unpacked_by(engine, request(latents(1, 32, 3, 4), hints=Hints(denormalized=True)))
