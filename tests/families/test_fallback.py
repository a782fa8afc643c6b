"""The local fallback, which has no table of families, gives what the family's own pipeline gives, or nothing: it never gives
other pixels, whatever the hints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2i

from families.case import Case
from families.shown import FOR_LAYOUTS
from families.through_engine import (
    CASES,
    CHANNELS_LAST,
    ENCODED_CHANNELS_LAST,
    NOT_NORMALISED,
    TOLERANCE,
    UNSCALED_BY_CONFIG,
    config_of,
    difference,
    hints_of,
    no_noise,
)
from remote_vae.errors import BadRequest, Unavailable
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.request import Request
from remote_vae.protocol.tensors import from_array, to_torch
from remote_vae.protocol.wire import Scaling
from remote_vae.transports.local import LocalTransport

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

REFUSED = {
    "AutoencoderRAE", "AutoencoderRAE: tokens", "AutoencoderKLQwenImage: Layered, packed",
    "AutoencoderKLFlux2: Flux.2 dev, packed", "AutoencoderKLFlux2: ERNIE-Image, patches", "AutoencoderKLFlux2: Bria FIBO 2",
    "AutoencoderKLFlux2: Ideogram 4, packed",
    "Kandinsky6SRVAE", "AutoencoderKLMiniMaxH3",
}  # fmt: skip
"""Cases that are refused: their scaling, range or layout is known to the server alone."""
FAILED = {
    "AutoencoderKLQwenImage: packed", "AutoencoderKLQwenImage: Edit", "AutoencoderKLQwenImage21: packed",
    "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLWan: FIBO", "AutoencoderKLWan: FIBO, patched", "AutoencoderKLWan: JoyImage",
    "AutoencoderKLWan: JoyImage Plus", "AutoencoderKLHunyuanVideo: Kandinsky 5", "AutoencoderVidTok: fsq",
    "AutoencoderVidTok: kl, causal",
}  # fmt: skip
"""Cases whose latents the module does not take as they are: the server's error is raised."""
ENCODE_HINTS = ("layout", "denormalized", "sigma_data")
GONE = Unavailable("gone")


def shown(cases: tuple[Case, ...]) -> list[object]:
    """Those with hints, and one of each layout, in `make test`; all of them in `make test-families`."""
    return [
        pytest.param(
            case, id=case.name,
            marks=() if case.name in FOR_LAYOUTS or hints_of(case).given() else pytest.mark.families,
        )
        for case in cases
    ]  # fmt: skip


def local(case: Case) -> LocalTransport:
    module = case.build()
    module.register_to_config(**config_of(case))
    return LocalTransport(module)


def answer(transport: LocalTransport, request: Request) -> torch.Tensor:
    return to_torch(transport.in_place_of(GONE, request).tensor)


def decoded(case: Case, latents: torch.Tensor) -> torch.Tensor:
    transport, said = local(case), case.parameters
    factor = said.get("scaling_factor") if case.class_name == UNSCALED_BY_CONFIG else None
    scaling = Scaling(own=True) if factor is None else Scaling(factor=factor)
    sizes = said.get("height"), said.get("width")
    one = [
        answer(transport, DecodeRequest(from_array(z), scaling, Output.UNIT, *sizes, hints=hints_of(case)))
        for z in latents.split(1)
    ]
    return torch.stack(one) if case.media == "video" else torch.cat(one)


@pytest.mark.parametrize("case", shown(CASES))
def test_the_fallback_decodes_as_the_familys_pipeline_or_not_at_all(case: Case) -> None:
    module = case.build()
    latents = case.latents(module)
    if case.name in REFUSED or case.name in FAILED:
        with pytest.raises(BadRequest if case.name in REFUSED else Unavailable):
            decoded(case, latents)
        return
    assert difference(decoded(case, latents), case.reference(module, latents)) <= TOLERANCE


@pytest.mark.parametrize("case", shown(tuple(case for case in CASES if case.encode)))
def test_the_fallback_encodes_as_the_familys_pipeline_or_not_at_all(case: Case) -> None:
    assert case.encode is not None
    said: dict[str, Any] = {name: value for name, value in hints_of(case).to_plain().items() if name in ENCODE_HINTS}
    hints = CHANNELS_LAST if case.name in ENCODED_CHANNELS_LAST else Hints(**said)
    scaling = Scaling() if case.name in NOT_NORMALISED else Scaling(own=True)
    request = EncodeRequest(
        from_array(case.encode.pixels()), scaling, SampleMode(case.encode.mode), case.encode.seed, hints
    )
    with patch.object(pipeline_kandinsky_i2i, "randn_tensor", no_noise):
        theirs = case.encode.reference(case.build(), case.encode.pixels())
    try:
        ours = answer(local(case), request)
    except (BadRequest, Unavailable):
        return
    assert difference(ours, theirs) <= TOLERANCE


def test_samples_of_one_request_draw_noise_of_their_own() -> None:
    case = next(case for case in CASES if case.class_name == "ConsistencyDecoderVAE")
    transport, one = local(case), case.latents(case.build())
    first = DecodeRequest(from_array(one), Scaling(own=True), Output.UNIT, hints=hints_of(case))
    both = answer(transport, replace(first, latents=from_array(torch.cat([one, one]))))
    second = answer(transport, replace(first, hints=first.hints.of_sample(1)))
    assert difference(both[:1], both[1:]) > 0.01
    assert difference(both[1:], second) <= TOLERANCE
