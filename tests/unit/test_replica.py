"""What a replica decides without Ray's help: its device, and what is said of a model that is not running."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from remote_vae.errors import ModelFailed
from remote_vae.protocol.hints import PARAMETERS
from remote_vae.protocol.wire import PROTOCOL
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.fake import FakeEngine
from remote_vae_serve.replica import replica
from remote_vae_serve.replica.description import describe_arguments
from remote_vae_serve.replica.replica import VAE, resolve_device
from samples import save_tiny_vae

NO_GPU_ASSIGNED = "Ray assigned this replica no GPU.*ray_actor_options"
NO_CUDA = "torch cannot use CUDA.*device: cpu"


@pytest.mark.parametrize(
    ("device", "num_gpus", "assigned", "cuda", "expected"),
    [
        ("auto", 0, 0, False, "cpu"),
        ("auto", 0, 0, True, "cpu"),  # a GPU that Ray gave to nobody is not taken
        ("auto", 1, 1, True, "cuda"),
        ("auto", 0.5, 1, True, "cuda"),
        ("auto", "auto", 0, True, "cpu"),
        ("auto", "auto", 1, True, "cuda"),
        ("cuda", 1, 1, True, "cuda"),
        ("cpu", 0, 0, False, "cpu"),
        ("cpu", 1, 1, True, "cpu"),
        ("cpu", 1, 0, False, "cpu"),
    ],
)
def test_the_device_is_cuda_where_ray_assigned_a_gpu(
    device: Any, num_gpus: Any, assigned: int, cuda: bool, expected: str
) -> None:
    config = VAEConfig(source="demo", device=device, num_gpus=num_gpus)
    assert resolve_device(config, assigned, cuda) == expected


@pytest.mark.parametrize(
    ("device", "num_gpus", "assigned", "cuda", "reason"),
    [
        ("auto", 1, 0, True, NO_GPU_ASSIGNED),
        ("auto", 0.5, 0, False, NO_GPU_ASSIGNED),
        ("cuda", 0, 0, True, NO_GPU_ASSIGNED),
        ("cuda", "auto", 0, True, NO_GPU_ASSIGNED),
        ("cuda", 1, 0, True, NO_GPU_ASSIGNED),
        ("auto", 1, 1, False, NO_CUDA),
        ("cuda", 1, 1, False, NO_CUDA),
    ],
)
def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_failure_with_its_reason(
    device: Any, num_gpus: Any, assigned: int, cuda: bool, reason: str
) -> None:
    """Falling back to the CPU would serve a hundred times slower and tell nobody."""
    config = VAEConfig(source="demo", device=device, num_gpus=num_gpus)
    with pytest.raises(ModelFailed, match=reason):
        resolve_device(config, assigned, cuda)


def test_a_fake_engine_needs_no_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica with one starts in half the time."""
    monkeypatch.setitem(sys.modules, "remote_vae_serve.engine.diffusers_engine", None)  # to import it fails
    fake = VAEConfig(source="nowhere", fake={"decode_s": 0})  # type: ignore[arg-type]
    assert isinstance(replica.build_engine(fake, lambda event: None), FakeEngine)


def test_a_cold_model_is_described_by_its_arguments() -> None:
    config = VAEConfig(source="org/model", subfolder="vae", variant="fp16", num_gpus=1)
    assert describe_arguments(config).to_plain() == {
        "protocol": PROTOCOL,
        "source": "org/model",
        "subfolder": "vae",
        "variant": "fp16",
        "dtype": "auto",
        "encode_dtype": "auto",
        "device": "auto",
        "num_gpus": 1,
    }


def test_a_description_survives_the_json_of_serves_status() -> None:
    description = describe_arguments(VAEConfig(source="demo", revision="abc")).to_plain()
    assert json.loads(json.dumps(description)) == description


def test_a_model_lists_the_hints_it_takes_with_their_meaning_and_those_of_its_application(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="flux", replica_tag="flux")
    )
    monkeypatch.setattr(replica, "EventCounters", Mock())
    monkeypatch.setattr(replica.ray, "get_gpu_ids", list)
    save_tiny_vae("flux", tmp_path)
    hints = {"patch_order": "ph_pw_c"}
    description = VAE(VAEConfig(source=str(tmp_path), device="cpu", threads=1, hints=hints)).description().to_plain()
    assert description["state"] == "ready"
    assert list(description["hints"]) == ["layout", "patch_order", "denormalized"]
    assert description["hints"]["patch_order"] == next(one.meaning for one in PARAMETERS if one.name == "patch_order")
    assert description["application_hints"] == hints
    assert json.loads(json.dumps(description)) == description
