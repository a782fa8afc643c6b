"""The engine: weights on a device, latents to pixels and pixels to latents. Knows no Ray and no HTTP.

`Engine` is the seam. `DiffusersEngine` is the real one; `fake.FakeEngine` stands in for it in tests of the service.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from remote_vae.errors import BadRequest, ModelFailed
from remote_vae.tensors import to_torch
from remote_vae.wire import DecodeRequest
from remote_vae_serve import codecs, weights
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.families import LatentSpace, Layout, Size, scale_and_shift


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Latents as the decoder takes them, and how to give its output the form that the client expects."""

    latents: torch.Tensor
    layout: Layout
    shape: tuple[int, ...]


class Engine(ABC):
    """One model on one device.

    `load` first; then `unpack` (host), `decode` (device) and `codecs.write` (host) are the stages of a request.
    `decode` and `encode` are called from one thread at a time.
    """

    space: LatentSpace
    dtype: torch.dtype
    device: str

    @abstractmethod
    def load(self) -> None:
        """Bring the weights to the device. Raises ModelFailed with the reason, for people."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode denormalised latents `[B, C, h, w]` of `dtype` to pixels `[B, 3, H, W]` on the device."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode pixels `[B, 3, H, W]` in [-1, 1] to latents, not normalised: sampled with a generator, else the mode."""

    @property
    def revision(self) -> str:
        """What identifies the weights."""
        return ""

    def unpack(self, request: DecodeRequest) -> Unpacked:
        """Check a request against the model; bring its latents into the decoder's layout, scale and dtype.

        Arithmetic is done in the wider of the latents' dtype and the decoder's: where they are equal that is what every
        pipeline does, and SDXL's casts up before it scales. Families whose pipelines cast first do so here.

        Raises:
            BadRequest: naming the parameter.
        """
        latents = to_torch(request.latents)
        size = Size(request.height, request.width)
        layout = self.space.family.layout_of(latents, self.space, size)
        batch = 1 if latents.ndim == 3 and request.height is None else latents.shape[0]
        codecs.check_output(request.output, batch, layout.media)
        wider = torch.promote_types(latents.dtype, self.dtype)
        unpacked = layout.unpack(latents, self.space, size).to(self.dtype if self.space.family.cast_first else wider)
        height, width = (size * self.space.ratio for size in unpacked.shape[-2:])
        codecs.check_size(request.output, height, width)
        scaling = request.scaling
        scaled = (
            self.space.denormalise(unpacked)
            if scaling.own
            else scale_and_shift(unpacked, scaling.factor, scaling.shift)
        )
        ready = scaled.to(self.dtype)
        if not bool(torch.isfinite(ready).all()):
            if bool(torch.isfinite(latents).all()):
                name = str(self.dtype).removeprefix("torch.")
                raise BadRequest(f"The latents leave the range of {name} when they are scaled; look at the factor",
                                 parameter="scaling_factor")  # fmt: skip
            raise BadRequest(
                "The latents contain NaN or infinity; nothing can be decoded from them", parameter="tensor"
            )
        return Unpacked(ready, layout, tuple(latents.shape))


class DiffusersEngine(Engine):
    """A diffusers autoencoder, loaded from safetensors and run eagerly.

    Args:
        config: the model's arguments.
        device: `cpu` or `cuda`, resolved.
    """

    def __init__(self, config: VAEConfig, device: str) -> None:
        self._config = config
        self._vae: Any = None
        self.device = device

    def load(self) -> None:
        self._set_threads()
        self._weights = weights.fetch(self._config)
        self.space = latent_space(self._weights.config(), self._config.source)
        safe = self.space.family.safe_dtype(self.space, self.device)
        self.dtype = safe if self._config.dtype == "auto" else getattr(torch, self._config.dtype)
        model_class = getattr(diffusers, self.space.class_name)
        try:
            vae, loaded = model_class.from_pretrained(
                self._weights.folder, variant=self._config.variant, torch_dtype=self.dtype, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
            if loaded["missing_keys"]:
                raise ValueError(f"its safetensors lack {', '.join(sorted(loaded['missing_keys'])[:3])}")
            self._vae = vae.to(self.device).eval().requires_grad_(False)
        except Exception as error:  # whatever the loading code raises becomes a reason that clients see
            raise ModelFailed(
                f"{self._config.source} could not be loaded: {load_reason(error, self.device)}"
            ) from error

    def _set_threads(self) -> None:
        """Ray sets OMP_NUM_THREADS=1 in a replica that reserves less than one CPU; a decode would crawl."""
        reserved = int(self._config.num_cpus)
        torch.set_num_threads(self._config.threads or reserved or len(os.sched_getaffinity(0)))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(latents.to(self.device), return_dict=False)[0]
        return pixels

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        encoded = self._vae.encode(pixels.to(self.device, self.dtype))
        if hasattr(encoded, "latent_dist"):
            distribution = encoded.latent_dist
            latents: torch.Tensor = distribution.mode() if generator is None else distribution.sample(generator)
            return latents
        latents = encoded.latents  # AutoencoderTiny has no distribution
        return latents

    @property
    def revision(self) -> str:
        return self._weights.revision


def latent_space(config: dict[str, Any], source: str) -> LatentSpace:
    """What a model's config.json says of its latents, its class's defaults filled in; no weight is read.

    Raises:
        ModelFailed: its class is no autoencoder of the installed diffusers.
    """
    name = config.get("_class_name", "")
    model_class: Any = getattr(diffusers, name, None)
    if not hasattr(model_class, "decode"):
        raise ModelFailed(
            f"{source} holds a {name or 'model of no class'}, which is no autoencoder of this diffusers "
            f"({diffusers.__version__}); is `subfolder` right?"
        )
    parameters = inspect.signature(model_class).parameters.values()
    try:
        return LatentSpace.of(name, {parameter.name: parameter.default for parameter in parameters} | config)
    except (KeyError, TypeError) as error:
        raise ModelFailed(
            f"{source} is a {name}, whose config does not say its {error}; it cannot be served yet"
        ) from error


def load_reason(error: Exception, device: str) -> str:
    """Why weights that are here could not be loaded, in words."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory on {device}: {text[:200] or 'the weights do not fit'}; give it more, or a smaller dtype"
    return f"{type(error).__name__}: {text[:500]}"
