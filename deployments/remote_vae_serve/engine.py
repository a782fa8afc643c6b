"""The engine: weights on a device, latents to pixels and pixels to latents. Knows no Ray and no HTTP.

`Engine` is the seam. `DiffusersEngine` is the real one; `fake.FakeEngine` stands in for it in tests of the service.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import torch

from remote_vae.decoding import DecodeRequest, Output
from remote_vae.encoding import EncodeRequest, SampleMode
from remote_vae.errors import BadRequest, ModelFailed
from remote_vae.tensors import to_torch
from remote_vae_serve import codecs, weights
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.families import ONE_IMAGE, LatentSpace, Layout, Size, scale_and_shift, shift_and_scale
from remote_vae_serve.pictures import Prepared, prepare

MAX_GROUP = 8
MAX_GROUP_PIXELS = 2**22
"""Of the pictures decoded as one batch: four of 1024x1024."""


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Latents as the decoder takes them, and how to give its output the form that the client expects."""

    latents: torch.Tensor
    layout: Layout
    shape: tuple[int, ...]


class Engine(ABC):
    """One model on one device.

    `load` first; then `unpack` (host), `decode` (device) and `codecs.write` (host) are the stages of a decode, `prepare`,
    `encode` and `pack` those of an encode. `decode` and `encode` are called from one thread at a time.

    Attributes:
        dtype, encode_dtype: what decoder and encoder run in.
        model_config: the model's config.json, its class's defaults filled in.
    """

    space: LatentSpace
    dtype: torch.dtype
    encode_dtype: torch.dtype
    device: str
    model_config: Mapping[str, Any] = {}

    @abstractmethod
    def load(self) -> None:
        """Bring the weights to the device. Raises ModelFailed with the reason, for people."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode denormalised latents `[B, C, h, w]` of `dtype` to pixels `[B, 3, H, W]` on the device."""

    @abstractmethod
    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode pixels `[B, 3, H, W]` in [-1, 1] to latents, not normalised, or to the moments of their distribution.

        Args:
            generator: of the sample, on the CPU; None for chance.
        """

    def leave(self, pixels: torch.Tensor, output: Output) -> torch.Tensor:
        """What leaves the device of decoded pixels for an output: see `codecs.leave`."""
        return codecs.leave(pixels, output)

    def group_limit(self, latents: torch.Tensor) -> int:
        """Largest batch that these latents, `[B, C, ...]`, may be decoded in together with others of their shape."""
        return 1

    def on_device(self) -> AbstractContextManager[object]:
        """Entered once by the thread that calls `decode` and `encode`."""
        return nullcontext()

    @property
    def revision(self) -> str:
        """What identifies the weights."""
        return ""

    @property
    def encodes(self) -> Literal["moments", "latents"] | None:
        """What the encoder gives: the moments of a distribution, or latents; None where there is no encoder."""
        return "moments" if self.space.family.has_distribution else "latents"

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
        batch = 1 if layout is ONE_IMAGE else latents.shape[0]
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

    def prepare(self, request: EncodeRequest) -> Prepared:
        """The pixels of a request as the encoder takes them, in `encode_dtype`. Raises BadRequest naming the parameter."""
        if self.encodes is None:
            raise BadRequest(f"{self.space.class_name} has no encoder; it only decodes", parameter="model")
        if self.encodes == "latents" and request.sample_mode is SampleMode.MOMENTS:
            raise BadRequest(f"{self.space.class_name} encodes to latents, not to a distribution; use argmax",
                             parameter="sample_mode")  # fmt: skip
        prepared = prepare(request, self.space)
        return replace(prepared, pixels=prepared.pixels.to(self.encode_dtype))

    def pack(self, latents: torch.Tensor, prepared: Prepared, request: EncodeRequest) -> torch.Tensor:
        """What the encoder gave, in the convention that the request asks for: `[B, C, h, w]` or `[B, C, T, h, w]`."""
        scaling = request.scaling
        scaled = (
            self.space.normalise(latents) if scaling.own else shift_and_scale(latents, scaling.factor, scaling.shift)
        )
        return prepared.unfold(scaled)


class DiffusersEngine(Engine):
    """A diffusers autoencoder, loaded from safetensors and run eagerly.

    Args:
        config: the model's arguments.
        device: `cpu` or `cuda`, resolved.
    """

    def __init__(self, config: VAEConfig, device: str) -> None:
        self._config = config
        self._vae: Any = None
        self._encoder: Any = None
        self.device = device

    def load(self) -> None:
        self._set_threads()
        self._weights = weights.fetch(self._config)
        self.model_config = filled_in(self._weights.config(), self._config.source)
        self.space = latent_space(self.model_config, self._config.source)
        safe = self.space.family.safe_dtype(self.space, self.device)
        self.dtype = safe if self._config.dtype == "auto" else getattr(torch, self._config.dtype)
        safe = self.space.family.safe_encode_dtype(self.space, self.device)
        self.encode_dtype = safe if self._config.encode_dtype == "auto" else getattr(torch, self._config.encode_dtype)
        self._vae = self._load(self.dtype)
        self._encoder = self._vae if self.encode_dtype == self.dtype else None

    def _load(self, dtype: torch.dtype) -> Any:
        """The model in that dtype. Raises ModelFailed."""
        try:
            vae, loaded = getattr(diffusers, self.space.class_name).from_pretrained(
                self._weights.folder, variant=self._config.variant, torch_dtype=dtype, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
            if loaded["missing_keys"]:
                raise ValueError(f"its safetensors lack {', '.join(sorted(loaded['missing_keys'])[:3])}")
            return vae.to(self.device).eval().requires_grad_(False)
        except Exception as error:  # whatever the loading code raises becomes a reason that clients see
            raise ModelFailed(
                f"{self._config.source} could not be loaded: {load_reason(error, self.device)}"
            ) from error

    def _set_threads(self) -> None:
        """Ray sets OMP_NUM_THREADS=1 in a replica that reserves less than one CPU; a decode would crawl."""
        reserved = int(self._config.num_cpus)
        torch.set_num_threads(self._config.threads or reserved or len(os.sched_getaffinity(0)))

    def on_device(self) -> AbstractContextManager[object]:
        # A stream of its own: copies of one result and the decode of the next do not wait for each other.
        return torch.cuda.stream(torch.cuda.Stream()) if self.device == "cuda" else nullcontext()  # type: ignore[no-untyped-call]

    def group_limit(self, latents: torch.Tensor) -> int:
        if self._config.batching == "off" or not self.space.family.decodes_batches:
            return 1
        pixels = latents[0, 0].numel() * self.space.ratio**2
        return max(1, min(MAX_GROUP, MAX_GROUP_PIXELS // pixels))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(self._to_device(latents, self.dtype), return_dict=False)[0]
        return pixels

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.device == "cpu":
            return tensor.to(dtype)
        return tensor.pin_memory().to(self.device, dtype, non_blocking=True)

    @torch.inference_mode()
    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if self._encoder is None:  # in another dtype than the decoder; whoever only decodes never pays for it
            self._encoder = self._load(self.encode_dtype)
            self._encoder.decoder = None
        encoded = self._encoder.encode(self._to_device(pixels, self.encode_dtype))
        latents: torch.Tensor
        if not self.space.family.has_distribution:
            latents = encoded.latents
        elif mode is SampleMode.SAMPLE:
            latents = encoded.latent_dist.sample(generator)
        else:
            latents = encoded.latent_dist.mode() if mode is SampleMode.ARGMAX else encoded.latent_dist.parameters
        return latents

    @property
    def encodes(self) -> Literal["moments", "latents"] | None:
        return super().encodes if hasattr(self._vae, "encode") else None

    @property
    def revision(self) -> str:
        return self._weights.revision


def filled_in(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A model's config.json with its class's defaults in place of what it leaves out; no weight is read.

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
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return defaults | {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of somebody's


def latent_space(config: Mapping[str, Any], source: str) -> LatentSpace:
    """What a model's filled-in config says of its latents. Raises ModelFailed where it does not."""
    name = config["_class_name"]
    try:
        return LatentSpace.of(name, config)
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
