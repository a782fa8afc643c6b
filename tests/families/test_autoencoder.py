"""`as_autoencoder()` in the code of diffusers' own pipelines, for every convention: what it makes with the stand-in is what it
makes with the VAE itself."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2i

from families.pipeline_transport import remote
from families.shown import parameters
from families.through_engine import CASES, TOLERANCE, Served, difference, no_noise

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
