"""The ways to decode that are compared: this engine, eager and fast, plain diffusers, OpenVINO and ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from remote_vae_serve.engine import threads
from remote_vae_serve.engine.memory import malloc_cache
from remote_vae_serve.engine.rewrites.table import NAMES

OF_A_REPLICA = malloc_cache.ENVIRONMENT | threads.ENVIRONMENT
Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        name: in the table and on the command line.
        load: makes the decode of a folder of weights, for latents like those given.
    """

    name: str
    load: Callable[[Path, torch.Tensor], Decode]

    @property
    def environment(self) -> dict[str, str]:
        """Of its process: what a replica has, for this engine."""
        return OF_A_REPLICA if self.name.startswith(("eager", "fast")) else {}


def _engine(engine: str, dtype: str, without: str | None = None) -> Callable[[Path, torch.Tensor], Decode]:
    def load(folder: Path, latents: torch.Tensor) -> Decode:
        from remote_vae_serve.config import VAEConfig
        from remote_vae_serve.engine import diffusers_engine

        names = tuple(name for name in NAMES if engine == "fast" and name != without)
        with patch.object(diffusers_engine, "rewrites_of", lambda engine, device: names):
            loaded = diffusers_engine.DiffusersEngine(
                VAEConfig(source=str(folder), device="cpu", num_gpus=0, engine=engine, dtype=dtype), "cpu"
            )
        loaded.load()
        return lambda given: loaded.decode(
            given.to(loaded.dtype), loaded.plan_decode(tuple(given.shape))
        ).pixels.float()

    return load


def _model(folder: Path) -> Any:
    import json

    import diffusers

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder).eval().requires_grad_(False)


def _diffusers(folder: Path, latents: torch.Tensor) -> Decode:
    model = _model(folder)
    return lambda given: model.decode(given, return_dict=False)[0]  # type: ignore[no-any-return]


class _Decoder(torch.nn.Module):
    """A model whose `forward` is its decode, for those who convert modules."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor) -> Any:
        return self.model.decode(latents, return_dict=False)[0]


def _openvino(precision: str) -> Callable[[Path, torch.Tensor], Decode]:
    def load(folder: Path, latents: torch.Tensor) -> Decode:
        import openvino

        with torch.inference_mode():
            converted = openvino.convert_model(_Decoder(_model(folder)), example_input=latents, input=latents.shape)
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        return lambda given: torch.from_numpy(compiled(given.numpy())[0])

    return load


def _onnxruntime(folder: Path, latents: torch.Tensor) -> Decode:
    import onnxruntime

    with tempfile.TemporaryDirectory() as here, torch.inference_mode():
        path = str(Path(here) / "decoder.onnx")
        torch.onnx.export(_Decoder(_model(folder)), (latents,), path, dynamo=False, input_names=["latents"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {"latents": given.numpy()})[0])


TODAY = "eager float32"
WAYS = {
    way.name: way
    for way in (
        Way("diffusers float32", _diffusers),
        Way(TODAY, _engine("eager", "float32")),
        Way("fast float32", _engine("fast", "float32")),
        Way("eager bfloat16", _engine("eager", "bfloat16")),
        Way("fast bfloat16", _engine("fast", "bfloat16")),
        Way("OpenVINO float32", _openvino("f32")),
        Way("OpenVINO bfloat16", _openvino("bf16")),
        Way("ONNX Runtime float32", _onnxruntime),
        *(Way(f"fast bfloat16 without {name}", _engine("fast", "bfloat16", name)) for name in NAMES),
    )
}
ORDINARY = tuple(name for name in WAYS if " without " not in name)
