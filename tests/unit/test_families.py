"""Every layout and every convention against the code of diffusers' own pipelines, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from pipeline_ends import decoder_input, formula
from remote_vae.errors import BadRequest
from remote_vae_serve.families.family import LatentSpace
from remote_vae_serve.families.layouts import FOLDED, IMAGES, NO_HINTS, Layout, RequestHints
from remote_vae_serve.families.table import FAMILIES, GENERIC, latent_space_of
from samples import IMAGE_KINDS, KINDS, latents, tiny_vae

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def space_of(vae: Any) -> LatentSpace:
    return latent_space_of(type(vae).__name__, vae.config, vae)


def unpacked(space: LatentSpace, z: torch.Tensor, **sizes: int) -> tuple[Layout, torch.Tensor]:
    hints = RequestHints(**sizes)
    layout = space.family.layout_of(z, space, hints)
    return layout, layout.unpack(z, space, hints)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_convention_is_that_of_its_pipeline(kind: str, dtype: torch.dtype) -> None:
    vae = tiny_vae(kind).to(dtype)
    vae.register_to_config(force_upcast=False)  # else the SDXL pipeline runs in float32 where float16 is asked for
    z = latents(2, vae.config.latent_channels, 8, 12).to(dtype)
    ours = space_of(vae).family.scaling.denormalize(z, space_of(vae))
    theirs = decoder_input(kind, vae, z)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)
    if kind != "tiny":
        assert not torch.equal(ours, z)  # otherwise nothing was tested


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_latents_reach_the_decoder_as_in_the_flux_pipeline(dtype: torch.dtype) -> None:
    vae = tiny_vae("flux").to(dtype)
    z = latents(2, 4 * 6, 64).to(dtype)
    space = space_of(vae)
    _, ours = unpacked(space, z, height=64, width=96)
    assert torch.equal(
        space.family.scaling.denormalize(ours, space), decoder_input("flux", vae, z, height=64, width=96)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (16, 16), (65, 111), (79, 96), (32, 512)], ids=str)
def test_sizes_that_no_token_divides_are_rounded_as_flux_rounds_them(height: int, width: int) -> None:
    tokens = (height // 16) * (width // 16)
    z = latents(2, tokens, 64)
    layout, ours = unpacked(space_of(tiny_vae("flux")), z, height=height, width=width)
    assert torch.equal(ours, FluxPipeline._unpack_latents(z, height, width, vae_scale_factor=8))
    assert layout.media == "image"


def test_unpacking_is_the_inverse_of_flux_packing() -> None:
    z = latents(3, 16, 8, 12)
    packed = FluxPipeline._pack_latents(z, 3, 16, 8, 12)
    _, ours = unpacked(space_of(tiny_vae("flux")), packed, height=64, width=96)
    assert torch.equal(ours, z)


def test_images_are_taken_as_they_are_whatever_height_and_width_say() -> None:
    """Two clients send height and width that are wrong for what they send with them; for 4-D latents they mean nothing."""
    z = latents(2, 4, 8, 12)
    for sizes in ({}, {"height": 1, "width": 1}, {"height": 64}):
        layout, ours = unpacked(space_of(tiny_vae("sd")), z, **sizes)
        assert ours is z
        assert layout is IMAGES


def test_one_image_without_a_batch_axis_becomes_a_batch_of_one() -> None:
    z = latents(4, 8, 12)
    layout, ours = unpacked(space_of(tiny_vae("sd")), z)
    assert torch.equal(ours, z[None])
    assert layout.media == "image"


def test_frames_are_decoded_and_put_back_as_animate_diff_does() -> None:
    vae = tiny_vae("sd")
    vae.register_to_config(scaling_factor=0.5)  # AnimateDiff multiplies by 1 / 0.18215: a power of two divides alike
    z = latents(2, 4, 3, 4, 6)
    space = space_of(vae)
    layout, folded = unpacked(space, z)
    with torch.inference_mode():
        theirs = AnimateDiffPipeline.decode_latents(SimpleNamespace(vae=vae), z)
        assert layout.repack is not None
        ours = layout.repack(
            vae.decode(space.family.scaling.denormalize(folded, space)).sample, tuple(z.shape), NO_HINTS
        )
    assert layout.media == "video"
    assert ours.shape == theirs.shape == (2, 3, 3, 32, 48)
    assert torch.equal(ours, theirs)


def test_height_and_width_of_video_latents_are_ignored() -> None:
    layout, _ = unpacked(space_of(tiny_vae("sd")), latents(1, 4, 3, 4, 6), height=24, width=32)
    assert layout is FOLDED


IMG2IMG = {
    "sd": (StableDiffusionImg2ImgPipeline.prepare_latents, ()),
    "sdxl": (StableDiffusionXLImg2ImgPipeline.prepare_latents, ("latents_mean",)),
    "sd3": (StableDiffusion3Img2ImgPipeline.prepare_latents, ()),
    "flux": (FluxImg2ImgPipeline._encode_vae_image, ()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", IMG2IMG)
def test_normalising_is_that_of_the_image_to_image_pipeline(kind: str, dtype: torch.dtype) -> None:
    vae = tiny_vae(kind)
    z = latents(2, vae.config.latent_channels, 8, 12).to(dtype)
    names: dict[str, Any] = {"self": SimpleNamespace(vae=vae), "init_latents": z, "image_latents": z}
    if kind == "sdxl":
        for name in ("latents_mean", "latents_std"):  # as StableDiffusionXLImg2ImgPipeline.__call__ makes them
            names[name] = torch.tensor(vae.config[name]).view(1, 4, 1, 1).to(dtype)
    function, mentioned = IMG2IMG[kind]
    assert torch.equal(
        space_of(vae).family.scaling.normalize(z, space_of(vae)), eval(formula(function, *mentioned), names)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_normalising_undoes_denormalising(kind: str) -> None:
    space = space_of(tiny_vae(kind))
    z = latents(1, space.channels, 4, 4)
    torch.testing.assert_close(space.family.scaling.normalize(space.family.scaling.denormalize(z, space), space), z)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_channels_and_ratio_are_those_of_the_model(kind: str) -> None:
    vae = tiny_vae(kind)
    space = space_of(vae)
    with torch.inference_mode():
        pixels = vae.decode(latents(1, space.channels, 2, 3)).sample
    assert pixels.shape == (1, 3, 2 * space.ratio, 3 * space.ratio)


def test_statistics_that_are_null_are_no_statistics() -> None:
    """diffusers writes both as null into every config that has none."""
    vae = tiny_vae("sd")
    space = latent_space_of("AutoencoderKL", dict(vae.config) | {"latents_mean": None, "latents_std": None})
    z = latents(1, 4, 2, 2)
    assert torch.equal(space.family.scaling.denormalize(z, space), decoder_input("sd", vae, z))


def test_a_class_without_a_row_is_treated_as_an_image_vae() -> None:
    space = latent_space_of("AutoencoderOfTomorrow", {"latent_channels": 4})
    assert space.family is GENERIC
    assert space.family.layout_of(latents(1, 4, 2, 2), space, NO_HINTS) is IMAGES


def test_no_class_has_two_rows() -> None:
    classes = [name for family in FAMILIES for name in family.classes]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_auto_is_float32_on_a_cpu_and_never_float16_where_that_overflows(force_upcast: bool) -> None:
    space = latent_space_of("AutoencoderKL", dict(tiny_vae("sd").config) | {"force_upcast": force_upcast})
    on_gpu = torch.bfloat16 if force_upcast else torch.float16
    assert space.family.safe_dtype(space, "cpu") == torch.float32
    assert space.family.safe_dtype(space, "cuda") == on_gpu


@pytest.mark.parametrize(
    ("keeps", "decode", "encode"),
    [
        ((), torch.float32, torch.float32), (("encode",), torch.float32, torch.float32),
        (("decode",), torch.bfloat16, torch.float32), (("decode", "encode"), torch.bfloat16, torch.bfloat16),
    ],
)  # fmt: skip
def test_auto_is_bfloat16_on_a_fast_cpu_where_the_row_says_so(
    keeps: tuple[Literal["decode", "encode"], ...], decode: torch.dtype, encode: torch.dtype
) -> None:
    space = latent_space_of("AutoencoderKL", tiny_vae("sd").config)
    row = replace(space.family, bfloat16=keeps)
    assert row.safe_dtype(space, "cpu", lambda: True) is decode
    assert row.safe_dtype(space, "cpu", lambda: False) is torch.float32
    assert row.safe_encode_dtype(space, "cpu", decode) is encode
    assert row.safe_encode_dtype(space, "cpu", torch.float32) is torch.float32


def test_whether_a_cpu_is_fast_is_not_asked_where_it_does_not_matter() -> None:
    def never() -> bool:
        raise AssertionError

    space = latent_space_of("AutoencoderKL", tiny_vae("sd").config)
    assert space.family.safe_dtype(space, "cuda", never) is not torch.float32
    assert GENERIC.safe_dtype(space, "cpu", never) is torch.float32


@pytest.mark.parametrize(
    ("shape", "sizes", "parameter", "expected"),
    [
        ((1, 3, 8, 8), {}, "shape", r"\[B, 4, h, w\]"),
        ((1, 16, 8, 8), {}, "shape", r"\[B, 4, h, w\]"),
        ((1, 8, 8, 4), {}, "shape", r"\[B, 4, h, w\]"),
        ((4, 8), {}, "shape", r"\[4, h, w\]"),
        ((1, 3, 4, 8, 8), {}, "shape", r"\[B, 4, T, h, w\]"),
        ((1, 1, 4, 2, 8, 8), {}, "shape", r"\[B, 4, T, h, w\]"),
        ((5, 8, 8), {}, "height", r"\[4, h, w\].*height"),
        ((1, 24, 16), {}, "height", "height.*width"),
        ((1, 24, 16), {"width": 96}, "height", "height"),
        ((1, 24, 16), {"height": 64}, "width", "width"),
        ((1, 24, 16), {"height": 64, "width": 64}, "height", "4 x 4 = 16 tokens.*24"),
        ((1, 24, 16), {"height": 15, "width": 96}, "height", "0 tokens.*24"),
        ((1, 24, 64), {"height": 64, "width": 96}, "shape", "64 values a token.*16"),
        ((4, 6, 15), {"height": 32, "width": 48}, "shape", "15 values a token.*16"),
    ],
    ids=str,
)
def test_latents_that_fit_nothing_are_refused_with_what_was_expected(
    shape: tuple[int, ...], sizes: dict[str, int], parameter: str, expected: str
) -> None:
    with pytest.raises(BadRequest, match=expected) as caught:
        unpacked(space_of(tiny_vae("sd")), latents(*shape), **sizes)
    assert caught.value.parameter == parameter
