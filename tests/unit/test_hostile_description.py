"""`as_autoencoder()` of a server that says nonsense of its model, or answers with it: our errors, soon, in little memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch

from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
from remote_vae.errors import BadRequest, BrokenReply
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.transports.waiting import Waiting

FLUX2 = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
         "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip


class Server:
    """Says that of its model, and answers with a tensor of that shape."""

    def __init__(self, answer: tuple[int, ...] = (), **said: Any) -> None:
        self._answer, self._said = answer, {"class": "AutoencoderKL", "config": {}, "encode": "moments"} | said

    def description(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(self._said)

    def decode(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros(self._answer)

    encode = decode


@pytest.mark.parametrize(
    "name",
    ["os", "__init__", "torch", "ModelMixin", "UNet2DModel", "StableDiffusionPipeline", "OnnxRuntimeModel", "KolorsPipeline",
     "AutoRoundConfig", "", "x" * 10**5],
)  # fmt: skip
def test_a_class_that_is_no_autoencoder_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="has not; install the diffusers"):
        RemoteAutoencoder(Server(**{"class": name}))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 10**9},
        {"out_channels": -1, "block_out_channels": [2048, 2048]},
        {"latent_channels": 10**12},
        {"block_out_channels": [64] * 10**5, "down_block_types": ["DownEncoderBlock2D"] * 10**5},
        {"act_fn": "no such function"},
    ],
)
def test_a_config_that_fits_no_autoencoder_takes_neither_long_nor_much(config: dict[str, Any]) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(BadRequest, match="config does not fit AutoencoderKL"):
        RemoteAutoencoder(Server(config=config))
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB: a GiB"


@pytest.mark.parametrize("key", ["keys", "items", "get", "__class__"])
def test_a_config_hides_no_method_of_the_dictionary_that_it_is_kept_in(key: str) -> None:
    vae = RemoteAutoencoder(Server(config={key: 5, "sample_size": 77}))
    assert dict(vae.config)["sample_size"] == vae.config.sample_size == 77


@pytest.mark.parametrize(
    "name", ["decoder.conv_in.weight", "nope.x", "", "config", "forward", "__class__", "bn.eps", "bn.forward", "bn.a.b"]
)
def test_buffers_that_its_class_does_not_have_are_left_out(name: str) -> None:
    RemoteAutoencoder(Server(**{"class": "AutoencoderKLFlux2", "config": FLUX2, "buffers": {name: [1.0]}}))


@pytest.mark.parametrize("values", [[], [1.0, 2.0]])
def test_buffers_of_another_length_are_no_answer(values: list[float]) -> None:
    with pytest.raises(BrokenReply, match=r"bn\.running_mean"):
        RemoteAutoencoder(
            Server(**{"class": "AutoencoderKLFlux2", "config": FLUX2, "buffers": {"bn.running_mean": values}})
        )


@pytest.mark.parametrize("answer", [(5,), (1, 3), (2, 3, 32, 32), (1,) * 8])
def test_a_reply_that_is_no_pixels_is_said_to_be_none(answer: tuple[int, ...]) -> None:
    with pytest.raises(BrokenReply, match="pixels for latents"):
        RemoteAutoencoder(Server(answer)).decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("answer", [(8,), (1, 7, 2, 2), (2, 8, 2, 2), (1, 1, 2, 2)])
def test_a_reply_that_is_no_distribution_is_said_to_be_none(answer: tuple[int, ...]) -> None:
    with pytest.raises(BrokenReply, match="moments of 1 samples"):
        RemoteAutoencoder(Server(answer)).encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(("scale", "shift"), [([], []), ([1.0, 2.0], [1.0]), ([1.0] * 4, [1.0] * 4)])
def test_a_range_of_pixels_that_fits_no_channels_is_said_to_be_none(scale: list[float], shift: list[float]) -> None:
    with pytest.raises(BrokenReply, match="pixel_scale"):
        RemoteAutoencoder(Server(pixel_scale=scale, pixel_shift=shift)).encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    "tensor", [None, "x", torch.zeros(1, 4, 4, 4, device="meta"), torch.zeros(1, 4, 4, 4).to_sparse()]
)
def test_what_has_no_values_is_refused_by_name(tensor: Any) -> None:
    vae = RemoteAutoencoder(Server())
    for call in (vae.decode, vae.encode):
        with pytest.raises(BadRequest, match="expected a dense tensor"):
            call(tensor)


@pytest.mark.parametrize(
    ("class_name", "arguments", "parameter"),
    [
        ("AutoencoderKLTemporalDecoder", {"num_frames": 4}, "num_frames"),
        ("AutoencoderKLTemporalDecoder", {"num_frames": -1}, "num_frames"),
        ("AutoencoderKLTemporalDecoder", {"num_frames": 2.5}, "num_frames"),
        ("AutoencoderKLLTXVideo", {"temb": torch.zeros(5)}, "temb"),
        ("ConsistencyDecoderVAE", {"generator": []}, "generator"),
        ("ConsistencyDecoderVAE", {"generator": 5}, "generator"),
    ],
)
def test_arguments_that_do_not_fit_the_latents_are_refused_by_name(
    class_name: str, arguments: dict[str, Any], parameter: str
) -> None:
    vae = RemoteAutoencoder(Server(**{"class": class_name, "hints": {"seed": "of the noise"}}))
    with pytest.raises(BadRequest) as refused:
        vae.decode(torch.zeros(6, 4, 4, 4), **arguments)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize("seconds", [10**400, -5, float("nan"), float("inf")])
def test_a_start_that_took_no_time_there_is_tells_none(seconds: float) -> None:
    said = ModelDescription.from_plain({"state": "starting", "startup": {"a_s": seconds}, "reason": "a\nb\x1b[2J"})
    waiting = Waiting.at_server("decode", 2.0, said)
    assert (waiting.expected_s, str(waiting)) == (None, "starting, 2 s: a b [2J")
