"""`as_autoencoder()` in the code of diffusers' own pipelines, for every convention: what it makes with the stand-in is what it
makes with the VAE itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXVideoToVideoPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2i

from families.ends import bare
from families.pipeline_transport import remote
from families.shown import parameters
from families.through_engine import CASES, TOLERANCE, Served, difference, no_noise, serving
from families.video_pipelines import Denoiser, called, pixels, words

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
DRAWS_OF_THE_GENERATOR = ("ConsistencyDecoderVAE", "LTX2VideoDiffusionDecoderModel")
DRAWS_OF_CHANCE = ("AutoencoderKLLTXVideo: 0.9.1",)
"""Layers of it draw noise from torch's global generator, whoever decodes."""


def test_a_pipeline_decodes_with_it_as_with_the_vae(served: Served) -> None:
    case, module = served.case, served.case.build()
    vae, latents = remote(served).as_autoencoder(), case.latents(module)
    ours, theirs = case.reference(vae, latents), case.reference(module, latents)
    if case.class_name in DRAWS_OF_THE_GENERATOR:  # other noise, of a seed that the pipeline's generator gives
        assert difference(ours, case.reference(vae, latents)) <= TOLERANCE
        assert ours.shape == theirs.shape
    elif case.name in DRAWS_OF_CHANCE:
        assert ours.shape == theirs.shape
    else:
        assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("served", parameters(tuple(case for case in CASES if case.encode)), indirect=True)
def test_a_pipeline_encodes_with_it_as_with_the_vae(served: Served) -> None:
    case, module = served.case, served.case.build()
    assert case.encode is not None
    vae, pixels = remote(served).as_autoencoder(), case.encode.pixels()
    with patch.object(pipeline_kandinsky_i2i, "randn_tensor", no_noise):
        assert difference(case.encode.reference(vae, pixels), case.encode.reference(module, pixels)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["AutoencoderKLWan", pytest.param("AutoencoderKLCogVideoX", marks=pytest.mark.families)]
)
def test_a_video_goes_through_a_whole_pipeline(name: str, tmp_path: Path) -> None:
    """Encoded, noised, denoised by one step and decoded."""
    case = next(case for case in CASES if case.name == name)

    def video(vae: Any) -> torch.Tensor:
        size = {"height": 32, "width": 32}
        if name == "AutoencoderKLWan":
            transformer = Denoiser(in_channels=16, patch_size=(1, 2, 2))
            pipe = bare(
                WanVideoToVideoPipeline, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
            )
        else:
            transformer = Denoiser(
                in_channels=4, patch_size=2, patch_size_t=None, use_rotary_positional_embeddings=False,
                attention_head_dim=8, sample_height=4, sample_width=4,
            )  # fmt: skip
            pipe = bare(
                CogVideoXVideoToVideoPipeline, vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
            )
        frames = pixels(1, 3, 9, 32, 32)().transpose(1, 2) / 2 + 0.5
        return called(
            pipe,
            "pt",
            video=frames,
            strength=1.0,
            prompt_embeds=words(1),
            guidance_scale=1.0,
            num_inference_steps=2,
            **size,
        )

    with serving(case, tmp_path) as served:
        ours = video(remote(served).as_autoencoder())
    assert ours.std() > 0.01
    assert difference(ours, video(case.build())) <= TOLERANCE
