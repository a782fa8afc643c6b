"""Configurations and weights that no model can be made of: each is a reason, said when it is loaded, and never blames latents."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from in_process import diffusers_engine
from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.replica import replica
from remote_vae_serve.replica.replica import VAE
from samples import save_tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
NESTED = "[" * 100_000


@pytest.mark.parametrize("name", [None, 5, 1.5, [], ["AutoencoderKL"], {}, True, "", "utils", "x" * 10_000])
def test_a_class_that_is_none_is_named(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ModelFailed, match="no autoencoder") as caught:
        load_with(tmp_path, _class_name=name)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("number", [0, 0.0, float("nan"), float("inf"), "0.18215", [0.18215], True, {}])
def test_a_scaling_factor_that_is_none_is_named(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ModelFailed, match="scaling_factor of its config"):
        load_with(tmp_path, scaling_factor=number)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "0", [0]])
def test_a_shift_factor_that_is_none_is_named(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ModelFailed, match="shift_factor of its config"):
        load_with(tmp_path, shift_factor=number)


@pytest.mark.parametrize("std", [[1, 1, 1, 0], [1, 1, 1, float("nan")], [1, 1, 1, None, "1"], "1111"])
def test_deviations_that_are_none_are_named(tmp_path: Path, std: Any) -> None:
    with pytest.raises(ModelFailed, match="latents_std of its config"):
        load_with(tmp_path, latents_mean=[0, 0, 0, 0], latents_std=std)


@pytest.mark.parametrize("text", [NESTED, "{" * 50_000, '{"a":' * 50_000, "\udcff", "[]", "1", ""])
def test_json_that_nobody_can_read_is_a_reason(tmp_path: Path, text: str) -> None:
    save_tiny_vae("sd", tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFailed, match=r"config\.json"):
        diffusers_engine(tmp_path)


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    save_tiny_vae("sd", tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelFailed, match=r"no config\.json"):
        diffusers_engine(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    """diffusers takes them for the numbers that they are, and every decode is noise."""
    save_tiny_vae("sd", tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["decoder.conv_in.weight"] = (weights["decoder.conv_in.weight"] * 100).to(torch.int8)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelFailed, match=r"decoder\.conv_in\.weight is stored as I8"):
        diffusers_engine(tmp_path)


def test_integers_of_another_variant_beside_them_are_nobodys_fault(tmp_path: Path) -> None:
    save_tiny_vae("sd", tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    quantized = {name: (tensor * 100).to(torch.int8) for name, tensor in weights.items()}
    save_file(quantized, tmp_path / WEIGHTS.replace(".safetensors", ".int8.safetensors"), {"format": "pt"})
    diffusers_engine(tmp_path)


def test_whatever_loading_raises_is_the_reason_of_a_replica_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the constructor it would have Serve start the replica again for ever, and nobody would hear why."""

    def raising(*_: Any) -> Any:
        raise RecursionError("deep")

    monkeypatch.setattr(replica, "build_engine", raising)
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="sd", replica_tag="sd"))
    monkeypatch.setattr(replica, "EventCounters", lambda model: SimpleNamespace(count=None))
    description = VAE(VAEConfig(source="demo", num_gpus=0)).description()
    assert description.state == "failed"
    assert description.reason == "it could not be loaded: RecursionError: deep"


def test_a_bare_off_of_yaml_is_off() -> None:
    assert VAEConfig.model_validate({"source": "demo", "batching": False}).batching == "off"
    with pytest.raises(ValidationError, match="batching"):
        VAEConfig.model_validate({"source": "demo", "batching": True})


@pytest.mark.parametrize("subfolder", ["..", "../x", "vae/../../x", "/etc", "a/.."])
def test_a_subfolder_lies_inside_its_source(subfolder: str) -> None:
    with pytest.raises(ValidationError, match="inside the source"):
        VAEConfig(source="demo", subfolder=subfolder)


def load_with(folder: Path, **entries: Any) -> None:
    """Load a tiny Stable Diffusion VAE whose config.json has these entries."""
    save_tiny_vae("sd", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    diffusers_engine(folder)
