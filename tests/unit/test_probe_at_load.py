"""The probe when a model is loaded: NaN is a reason to be failed, and what cannot be probed is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from in_process import diffusers_engine
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.base import Engine
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.replica.health import Probe
from samples import KINDS, latents, save_tiny_vae, tiny_vae
from sick import BAD_REQUEST, FULL, LOST, Replica, Sick, engine, make, sick

__all__ = ["engine", "make", "sick"]  # fixtures


def save_nan(kind: str, folder: Path) -> Path:
    vae = tiny_vae(kind)
    parameter = next(vae.decoder.parameters())
    parameter.data[:] = torch.nan
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["sd", "hunyuan"])
def test_a_model_of_nan_is_failed_with_the_reason_and_not_started_for_ever(
    kind: str, make: Callable[[Engine], Replica], tmp_path: Path
) -> None:
    one = make(DiffusersEngine(VAEConfig(source=str(save_nan(kind, tmp_path)), threads=1), "cpu"))
    assert one.vae.description().state == "failed"
    assert "NaN" in str(one.vae.description().reason)
    answer = one.post(latents(1, 4, 8, 8))
    assert (answer.status_code, answer.json()["code"]) == (503, "model_failed")
    assert "NaN" in answer.json()["error"]
    one.check()


def test_a_device_that_fails_when_the_model_is_loaded_is_a_failed_model(
    engine: Sick, make: Callable[[Engine], Replica]
) -> None:
    engine.always = LOST
    one = make(engine)
    assert "illegal memory access" in str(one.vae.description().reason)
    one.check()


@pytest.mark.parametrize("error", [BAD_REQUEST, FULL, RuntimeError("kernel size can't be greater than input size")])
def test_a_model_that_takes_no_such_latent_is_served_and_not_probed(
    engine: Sick, make: Callable[[Engine], Replica], error: Exception
) -> None:
    engine.always = error
    one = make(engine)
    assert one.vae.description().state == "ready"
    engine.always, engine.of_clients = None, LOST
    probed = engine.probed
    assert one.post(latents(1, 4, 8, 8)).status_code == 500
    assert engine.probed == probed
    one.check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_kinds_are_probed_with_a_latent_that_is_always_the_same(kind: str, tmp_path: Path) -> None:
    engine = diffusers_engine(save_tiny_vae(kind, tmp_path))
    seen: list[torch.Tensor] = []
    decode = engine.decode
    engine.decode = lambda z, *arguments: seen.append(z) or decode(z, *arguments)  # type: ignore[method-assign, func-returns-value]
    probe = Probe(engine)
    assert probe.shape == ((1, 4, 1, 4, 4) if kind == "hunyuan" else (1, engine.space.channels, 4, 4))
    assert probe.fault() is None
    assert torch.equal(seen[0], seen[1])
    for parameter in engine._model(engine.dtype).decoder.parameters():
        parameter.data[:] = torch.nan
    assert probe.fault() == "the model decodes a small fixed latent to NaN or infinity"
