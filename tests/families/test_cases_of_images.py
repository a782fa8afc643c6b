"""The cases of the image autoencoders are what they say: they build, are deterministic, and would show a wrong convention."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from families.case import Case
from families.ends import end
from families.images import CASES
from families.images_made import whole

pytestmark = pytest.mark.families
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ENCODED = pytest.mark.parametrize("case", [case for case in CASES if case.encode], ids=lambda case: case.name)
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
UNSCALED = {
    "AutoencoderKLFlux2: Flux.2 Klein, denormalized",
    "VQModel: Kandinsky",
    "VQModel: LDM super-resolution",
    "VQModel: Amused, numbers of codes",
    "AutoencoderKLKVAE",
}
"""Cases in which the pipeline gives the latents to the module as they are."""
CANCELLED = {"ConsistencyDecoderVAE"}
"""Cases in which the module undoes what the pipeline does with the statistics."""
UNSCALED_ENCODED = {"VQModel: Kandinsky", "AutoencoderTiny: DreamLite"}
"""Cases in which it takes them from the encoder as they are."""
LATENTS = ("latents", "denoised")
"""What the pipelines call the denoised latents."""
WHEN_DENOISED = {
    "device": torch.device("cpu"),
    "prompt_embeds": torch.zeros(1),
    "num_images_per_prompt": 1,
    "num_channels_latents": 16,
    "patch_size": 2,
    "needs_upcasting": False,
    "use_resolution_binning": False,
}
"""What else some of them read at their end."""
NOT_PICTURES = (
    "Allegro", "Audio", "CogVideoX", "Cosmos", "Magvit", "MiniMax", "Mochi", "Oobleck", "SAME", "TemporalDecoder",
    "Video", "VidTok", "Wan",
)  # fmt: skip
"""Words in the names of autoencoders of video and sound."""
BY_NAME = {case.name: case for case in CASES}


@cache
def decoded(name: str) -> torch.Tensor:
    case = BY_NAME[name]
    return case.reference(case.build(), case.latents(case.build()))


@CASE
def test_a_case_builds_one_module_in_float32_that_is_not_trained(case: Case) -> None:
    vae = case.build()
    assert type(vae).__name__ == case.class_name
    assert vae.dtype == torch.float32
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert vae is case.build()


@CASE
def test_a_reference_is_pixels_between_0_and_1(case: Case) -> None:
    pixels = decoded(case.name)
    assert pixels.ndim == (5 if case.media == "video" else 4)
    assert pixels.shape[-3] in (3, 4)
    assert pixels.isfinite().all()
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert ((pixels > 0) & (pixels < 1)).float().mean() > 0.3, "most pixels are clamped, which would hide a mistake"
    assert pixels.std() > 0.01


@CASE
def test_a_reference_is_the_same_on_a_second_call(case: Case) -> None:
    vae = case.build()
    assert torch.equal(case.latents(vae), case.latents(vae))
    assert torch.equal(case.reference(vae, case.latents(vae)), decoded(case.name))


@CASE
def test_a_reference_depends_on_its_latents(case: Case) -> None:
    vae = case.build()
    other = case.reference(vae, case.latents(vae).flip(-1))
    assert (other - decoded(case.name)).abs().max() > 0.01


@CASE
def test_a_reference_changes_with_the_statistics_unless_the_pipeline_does_not_look_at_them(case: Case) -> None:
    other = copy.deepcopy(case.build())
    assert _changed(other) or case.name in UNSCALED
    difference = (case.reference(other, case.latents(case.build())) - decoded(case.name)).abs().max()
    assert difference < 1e-5 if case.name in UNSCALED | CANCELLED else difference > 1e-3


@CASE
def test_a_reference_is_not_what_the_module_makes_of_the_raw_latents(case: Case) -> None:
    vae, latents = case.build(), case.latents(case.build())
    channels = vae.config.get("latent_channels", vae.config.get("z_dim"))
    if case.name in UNSCALED or case.origin == "module" or latents.ndim not in (4, 5) or latents.shape[1] != channels:
        pytest.skip("the module cannot take these latents raw, or takes nothing else")
    if latents.ndim == 5 and case.media == "video":
        latents = latents.transpose(1, 2).flatten(0, 1)
    raw = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert (raw.reshape(decoded(case.name).shape) - decoded(case.name)).abs().max() > 1e-3


@ENCODED
def test_an_encode_case_gives_finite_latents_that_depend_on_the_pixels(case: Case) -> None:
    assert case.encode is not None
    vae, pixels = case.build(), case.encode.pixels()
    assert pixels.shape[1] in (3, 4)
    assert -1 <= pixels.min() <= pixels.max() <= 1
    latents = case.encode.reference(vae, pixels)
    assert latents.isfinite().all()
    assert torch.equal(case.encode.reference(vae, pixels), latents)
    other = case.encode.reference(vae, pixels.flip(-1))
    assert (other - latents).abs().max() > 1e-3
    assert (case.encode.seed is None) == (case.encode.mode == "argmax")


@ENCODED
def test_an_encode_case_changes_with_the_statistics_unless_the_pipeline_does_not_look_at_them(case: Case) -> None:
    assert case.encode is not None
    other = copy.deepcopy(case.build())
    _changed(other)
    pixels = case.encode.pixels()
    difference = (case.encode.reference(other, pixels) - case.encode.reference(case.build(), pixels)).abs().max()
    assert difference == 0 if case.name in UNSCALED_ENCODED else difference > 1e-3


def test_no_image_class_of_diffusers_is_without_a_case() -> None:
    """Those with a `decode` that are neither for video nor for sound; AutoencoderKL and Tiny have frames folded too."""
    shown = {"AsymmetricAutoencoderKL", "ConsistencyDecoderVAE", "VQModel"} | {
        name
        for name in dir(diffusers)
        if name.startswith("Autoencoder") and not any(word in name for word in NOT_PICTURES)
    }
    assert {case.class_name for case in CASES} == shown


def test_every_name_is_used_once() -> None:
    assert len(BY_NAME) == len(CASES)
    assert set(BY_NAME) >= UNSCALED | UNSCALED_ENCODED


# PRXPipeline inherits from a class that diffusers has deprecated.
@pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("case", "pipeline"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.pipelines[1:]],
)
def test_the_other_pipelines_that_a_case_stands_for_end_alike(case: Case, pipeline: str) -> None:
    """The first is the one that the reference is of."""
    vae, latents = case.build(), case.latents(case.build())
    kind = getattr(diffusers, pipeline)
    part = "movq" if "movq" in inspect.signature(kind.__init__).parameters else "vae"
    sizes = {"height": decoded(case.name).shape[-2], "width": decoded(case.name).shape[-1]} | case.parameters
    pixels = end(whole(kind, **{part: vae}), **sizes, **WHEN_DENOISED, **dict.fromkeys(LATENTS, latents),
        batch_size=len(latents), output_type="np" if part == "movq" else "pt")  # fmt: skip
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) if part == "movq" else pixels
    assert torch.equal(pixels, decoded(case.name))


def _changed(vae: Any) -> bool:
    """Changes all that a pipeline could denormalise with; whether there was anything."""
    held = {name: vae.config.get(name) for name in STATISTICS if vae.config.get(name) is not None}
    vae.register_to_config(**{name: (torch.tensor(value) * 1.5 + 0.1).tolist() for name, value in held.items()})
    norm = getattr(vae, "bn", None)
    if norm is not None:
        norm.running_mean.add_(0.3)
        norm.running_var.mul_(1.5)
    return bool(held) or norm is not None
