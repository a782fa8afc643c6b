"""What the server makes of latents and of pixels is what the family's own pipeline makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from families import images_others
from families.case import Case
from families.shown import parameters
from families.through_engine import (
    ALL,
    CASES,
    NOT_SERVED,
    TOLERANCE,
    Served,
    decode_difference,
    difference,
    encode_difference,
    hints_of,
    serving,
)
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.request import announced_from_plain, announced_to_plain
from remote_vae_serve.families.layouts import ONE_IMAGE, RequestHints
from remote_vae_serve.families.table import FAMILIES, GENERIC, latent_space_of

# LTX-2's diffusion decoder calls it so by itself, on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

GROUPED = tuple(
    case
    for case in CASES
    if any(case.class_name in row.classes and row.decodes_batches and not row.draws for row in FAMILIES)
)

DRAWING = tuple(case for case in CASES if "seed" in case.parameters)
"""Cases whose decoder draws noise."""


def test_decoded_pixels_are_those_of_its_own_pipeline(served: Served) -> None:
    assert served.engine.space.family is not GENERIC
    assert decode_difference(served) <= TOLERANCE


@pytest.mark.parametrize("served", parameters(tuple(case for case in CASES if case.encode)), indirect=True)
def test_encoded_latents_are_those_of_its_own_pipeline(served: Served) -> None:
    assert encode_difference(served) <= TOLERANCE


def test_latents_that_are_only_announced_are_planned_as_they_will_be_decoded(served: Served) -> None:
    request = served.request(served.latents())
    processor = served.engine.processor
    unpacked = processor.unpack_latents(request)
    assert processor.announced_latents(_announced(request)) == (tuple(unpacked.latents.shape), unpacked.hints)


@pytest.mark.parametrize("served", parameters(tuple(case for case in CASES if case.encode)), indirect=True)
def test_pixels_that_are_only_announced_are_planned_as_they_will_be_encoded(served: Served) -> None:
    assert served.case.encode is not None
    pixels, processor = served.case.encode.pixels(), served.engine.processor
    channels_last = (pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels[:1]).permute(0, 2, 3, 1)
    for sent in (pixels, (channels_last * 127 + 128).to(torch.uint8)):
        request = served.encode_request(sent)
        assert processor.announced_pixels(_announced(request)) == processor.preprocess_image(request).pixels.shape


def _announced(request: DecodeRequest | EncodeRequest) -> Any:
    """The same of which no byte has come."""
    return announced_from_plain(request.verb, announced_to_plain(request))


def test_a_batch_of_three_is_what_each_of_them_is_alone(served: Served) -> None:
    """The seed of each is the batch's and its place: see `Hints.of_sample`."""
    three = served.latents(3)
    apart = torch.cat([served.ask(one, number=number) for number, one in enumerate(three.split(1))])
    assert len({tuple(one.flatten().tolist()) for one in apart.split(len(apart) // 3)}) == 3
    assert difference(served.ask(three), apart) <= TOLERANCE


@pytest.mark.parametrize("served", parameters(DRAWING), indirect=True)
def test_samples_of_a_batch_draw_different_noise_and_the_same_once_more(served: Served) -> None:
    alike = torch.cat([served.latents(1)] * 3)
    drawn = served.ask(alike)
    first, second, third = drawn.split(len(drawn) // 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(served.ask(alike), drawn)


@pytest.mark.parametrize("served", parameters(tuple(case for case in DRAWING if case.media == "image")), indirect=True)
def test_a_batch_draws_what_diffusers_draws_by_a_list_of_generators(served: Served) -> None:
    three, seed = served.latents(3), served.case.parameters["seed"]
    generators = [torch.Generator().manual_seed(seed + number) for number in range(3)]
    with patch.object(images_others, "generator", lambda: generators):
        theirs = served.case.reference(served.case.build(), three)
    assert difference(served.ask(three, Output.UNIT), theirs) <= TOLERANCE


@pytest.mark.parametrize("case", parameters(GROUPED))
def test_requests_that_run_as_one_batch_get_what_they_get_alone(case: Case, tmp_path: Path) -> None:
    with serving(case, tmp_path, batching="auto") as served:
        four = served.latents(4)
        alone = [served.ask(one) for one in four.split(1)]
        with patch.object(served.engine, "decode_together", wraps=served.engine.decode_together) as batched:
            together = served.together(four)
    batched.assert_called()
    assert max(map(difference, together, alone)) <= TOLERANCE


def test_a_case_that_is_not_served_is_one_of_those_with_a_reason() -> None:
    assert len(CASES) + len(NOT_SERVED) == len(ALL)
    assert {case.class_name for case in CASES} == {name for row in FAMILIES for name in row.classes}


def test_every_layout_of_the_table_but_one_image_is_that_of_a_case() -> None:
    met = set()
    for case in CASES:
        module, size, hints = case.build(), case.parameters, hints_of(case)
        space = latent_space_of(case.class_name, module.config, module)
        hints = RequestHints.merged(hints, size.get("height"), size.get("width"))
        met.add(space.family.layout_of(case.latents(module), space, hints).expects)
    assert {layout.expects for row in FAMILIES for layout in row.layouts} - met == {ONE_IMAGE.expects}
