"""The reference cases of video autoencoders: they are whole, they repeat themselves, and a wrong convention would show."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import autoencoders

from families.case import Case
from families.ends import bare, end
from families.video import CASES
from families.video_pipelines import random

pytestmark = pytest.mark.families
IDENTITY = {
    "AutoencoderKLLTX2Video",  # as LTX2Pipeline hands them out
    "LTX2VideoDiffusionDecoderModel: of LTX2Pipeline",
    "AutoencoderKLKVAEVideo",
    "AutoencoderVidTok: fsq",
    "AutoencoderVidTok: kl, causal",
}
"""Whose decoder takes the latents' own values."""
ENCODERS = [case for case in CASES if case.encode]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_encoder = pytest.mark.parametrize("case", ENCODERS, ids=lambda case: case.name)


def spied(case: Case, monkeypatch: pytest.MonkeyPatch, instead: torch.Tensor | None = None) -> tuple[Any, torch.Tensor]:
    """The reference, and all that the decoder was given for it; with `instead`, the decoder is given that."""
    module, given = case.build(), []
    decode = module.decode

    def spy(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(z)
        return decode(z if instead is None else instead, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setitem(
            vars(module), "decode", spy
        )  # `setattr` would leave the method in the module, and a copy would call it
        return case.reference(module, case.latents(module)), given


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_no_two_cases_have_a_name_in_common():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_video_autoencoder_has_a_case():
    words = (
        "Video",
        "Wan",
        "CogVideo",
        "Mochi",
        "Allegro",
        "KLCosmos",
        "Magvit",
        "Temporal",
        "MiniMaxH3",
        "SR",
        "VidTok",
    )
    classes = {name for name, value in vars(autoencoders).items() if isinstance(value, type)}
    of_video = {name for name in classes if any(word in name for word in words) and "Audio" not in name}
    assert of_video == {case.class_name for case in CASES}


@each
def test_its_pipelines_are_diffusers_own_and_none_are_named_where_there_are_none(case: Case):
    assert all(hasattr(diffusers, name) for name in case.pipelines)
    assert bool(case.pipelines) == (case.origin != "module")


@each
def test_the_module_is_tiny_and_in_float32_and_learns_nothing(case: Case):
    module = case.build()
    assert type(module).__name__ == case.class_name
    assert not module.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) < 2_000_000


@each
def test_the_reference_is_pixels_of_the_latents_and_the_same_when_asked_again(case: Case):
    module = case.build()
    latents = case.latents(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    reference = case.reference(module, latents)
    assert reference.ndim == (4 if case.media == "image" else 5)
    assert reference.shape[0] == latents.shape[0]
    assert reference.shape[-3] == 3
    assert reference.dtype == torch.float32
    assert 0 <= reference.min() < reference.max() <= 1
    assert torch.equal(latents, case.latents(module))
    assert torch.equal(reference, case.reference(module, latents))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@each
def test_every_sample_and_every_frame_has_its_own_pixels(case: Case):
    reference = case.reference(case.build(), case.latents(case.build()))
    pictures = reference.flatten(0, -4)
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == len(pictures)


@each
def test_without_the_normalisation_the_decoder_is_given_other_values_and_makes_other_pixels(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    latents = case.latents(case.build())
    reference, given = spied(case, monkeypatch)
    same = [torch.isin(z, latents).float().mean().item() for z in given]
    if case.name in IDENTITY:
        assert min(same) == 1
        return
    assert max(same) < 0.01
    if [z.shape for z in given] == [latents.shape]:  # another layout cannot be handed to the decoder as it is
        undone, _ = spied(case, monkeypatch, instead=latents)
        assert (undone - reference).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["AutoencoderKLLTXVideo: 0.9.1", "AutoencoderKLLTXVideo: 0.9.5"])
def test_the_noise_of_a_timed_decoder_is_the_seeds_and_leaves_torchs_generator_alone(name: str):
    case = named(name)
    module = case.build()
    state = torch.random.get_rng_state()
    reference = case.reference(module, case.latents(module))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(reference, case.reference(module, case.latents(module)))


@pytest.mark.parametrize(("version", "injects"), [("0.9.1", True), ("0.9.5", False)])
def test_the_injected_noise_of_an_ltx_decoder_is_loud_enough_to_be_seen(version: str, injects: bool):
    module = named(f"AutoencoderKLLTXVideo: {version}").build()
    decoded = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            decoded.append(module.decode(random(1, 8, 2, 2, 2), torch.tensor([0.05]), return_dict=False)[0])
    assert ((decoded[0] - decoded[1]).abs().max() > 1e-2) == injects


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("AutoencoderKLWan", "WanImageToVideoPipeline"),
        ("AutoencoderKLWan", "WanVideoToVideoPipeline"),
        ("AutoencoderKLWan", "SkyReelsV2Pipeline"),
        ("AutoencoderKLWan", "LucyEditPipeline"),
        ("AutoencoderKLWan", "AnyFlowPipeline"),
        ("AutoencoderKLWan", "MotifVideoPipeline"),
        ("AutoencoderKLWan", "SanaVideoPipeline"),
        ("AutoencoderKLWan: 2.2 5B", "WanImageToVideoPipeline"),
        ("AutoencoderKLLTX2Video: SANA-Video", "SanaImageToVideoPipeline"),
        ("AutoencoderKLHunyuanVideo", "HunyuanSkyreelsImageToVideoPipeline"),
        ("AutoencoderKLHunyuanVideo", "HunyuanVideoImageToVideoPipeline"),
        ("AutoencoderKLHunyuanVideo15", "HunyuanVideo15ImageToVideoPipeline"),
        ("AutoencoderKLCogVideoX", "CogVideoXVideoToVideoPipeline"),
        ("AutoencoderKLCogVideoX", "CogVideoXFunControlPipeline"),
        ("AutoencoderKLMagvit", "EasyAnimateInpaintPipeline"),
    ],
)
def test_the_other_pipelines_of_a_case_end_alike(name: str, pipeline: str):
    case = named(name)
    assert pipeline in case.pipelines
    module = case.build()
    latents = case.latents(module)
    names = {"additional_frames": 0, "image_condition_type": "token_replace", "use_resolution_binning": False}
    pixels = end(bare(getattr(diffusers, pipeline), vae=module), latents=latents.clone(), vae_batch_size=None, **names)
    assert torch.allclose(pixels, case.reference(module, latents), atol=1e-6)


@each_encoder
def test_its_latents_of_pixels_are_finite_and_the_same_when_asked_again(case: Case):
    assert case.encode is not None
    module, pixels = case.build(), case.encode.pixels()
    latents = case.encode.reference(module, pixels)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert torch.equal(pixels, case.encode.pixels())
    assert latents.shape[0] == pixels.shape[0]
    assert torch.isfinite(latents).all()
    assert torch.equal(latents, case.encode.reference(module, pixels))
    assert (case.encode.seed is None) == (case.encode.mode == "argmax")


@pytest.mark.parametrize("case", [c for c in ENCODERS if c.encode.mode == "argmax"], ids=lambda case: case.name)
def test_an_encoder_that_takes_the_mode_is_normalised_too_but_for_stable_video_diffusion(case: Case):
    assert case.encode is not None
    module, pixels = case.build(), case.encode.pixels()
    single = pixels.ndim == 4 and case.class_name != "AutoencoderKLTemporalDecoder"
    with torch.no_grad():
        raw = module.encode(pixels.unsqueeze(2) if single else pixels).latent_dist.mode()
    latents = case.encode.reference(module, pixels)
    assert latents.shape == raw.shape
    assert torch.equal(latents, raw) == (case.class_name == "AutoencoderKLTemporalDecoder")
    assert torch.equal(latents, raw) or (latents - raw).abs().max() > 1e-3
