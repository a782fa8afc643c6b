"""`EagerEngine`: a diffusers autoencoder, loaded from safetensors and run as it is, within a budget of memory."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import diffusers
import torch

from remote_vae.encoding import SampleMode
from remote_vae.errors import BadRequest, ModelFailed, RemoteVAEError, Unavailable
from remote_vae_serve import weights
from remote_vae_serve.budget import GIB, budget
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine import Decoded, Engine
from remote_vae_serve.families import Size
from remote_vae_serve.forecast import Forecast, on_meta
from remote_vae_serve.model_config import filled_in, latent_space
from remote_vae_serve.tiling import WHOLE, Plan, plans, view

MAX_GROUP = 8
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "status_alloc_failed")
"""In the words of the CPU's allocator and of CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED), which raise a plain RuntimeError."""


class EagerEngine(Engine):
    """A diffusers autoencoder.

    Args:
        config: the model's arguments.
        device: `cpu` or `cuda`, resolved.
    """

    def __init__(self, config: VAEConfig, device: str) -> None:
        self._config = config
        self._models: dict[torch.dtype, Any] = {}
        self._forecasts: dict[torch.dtype, Forecast] = {}
        self._forecasting = threading.Lock()
        self.device = device

    def load(self) -> None:
        self._set_threads()
        self._weights = weights.fetch(self._config)
        self.model_config = filled_in(self._weights.config(), self._config.source)
        self.space = latent_space(self._weights.config(), self._config.source)
        self.dtype = self._resolve(self._config.dtype, self.space.family.safe_dtype(self.space, self.device))
        safe = self.space.family.safe_encode_dtype(self.space, self.device)
        self.encode_dtype = self._resolve(self._config.encode_dtype, safe)
        self._budget = budget(self._config, self.device)
        if self.free <= 0:
            raise ModelFailed(
                f"{self._config.source} takes {_gib(self.forecast(self.dtype).weights)} for its weights alone, and `memory` "
                f"leaves this replica {_gib(self._budget)}; give it more"
            )
        self._model(self.dtype)
        for shape in self._config.warm_up:
            self._warm_up(shape)

    def _warm_up(self, shape: tuple[int, ...]) -> None:
        zeros = torch.zeros(shape)
        try:
            layout = self.space.family.layout_of(zeros, self.space, Size())
            latents = layout.unpack(zeros, self.space, Size()).to(self.dtype)
            self.decode(latents, self.plan_decode(tuple(latents.shape)))
        except RemoteVAEError as error:
            raise ModelFailed(f"warm_up {list(shape)}: {error.message}") from error
        except Exception as error:  # out of the constructor it would have Serve start the replica again for ever
            raise ModelFailed(f"warm_up {list(shape)}: {load_reason(error, self.device)}") from error

    def _resolve(self, chosen: str, safe: torch.dtype) -> torch.dtype:
        """The dtype of the configuration; never float16 for a model whose config says that it overflows in it."""
        dtype: torch.dtype = safe if chosen == "auto" else getattr(torch, chosen)
        return torch.float32 if dtype is torch.float16 and self.space.force_upcast else dtype

    def _model(self, dtype: torch.dtype) -> Any:
        """The model in that dtype, loaded when it is first asked for: who only decodes in one never pays for another."""
        if dtype not in self._models:
            self._models[dtype] = self._load(dtype)
        return self._models[dtype]

    def _load(self, dtype: torch.dtype) -> Any:
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

    def forecast(self, dtype: torch.dtype) -> Forecast:
        """What requests take where they are computed in that dtype."""
        with self._forecasting:
            if dtype not in self._forecasts:
                graph = on_meta(getattr(diffusers, self.space.class_name), self.model_config, dtype)
                self._forecasts[dtype] = Forecast(graph, self.space.family.tile, self.space.ratio)
            return self._forecasts[dtype]

    @property
    def free(self) -> int:
        """Bytes of the budget that are left for work."""
        return self._free_for(self.dtype)

    def _free_for(self, dtype: torch.dtype) -> int:
        """Bytes that are left for work in that dtype, whose weights may yet have to be loaded."""
        # A copy: the device's thread loads a model while others plan.
        return self._budget - sum(self.forecast(one).weights for one in {dtype, *tuple(self._models)})

    def plan_decode(self, shape: tuple[int, ...]) -> Plan:
        return self._plan(shape, self.dtype)

    def _plan(self, shape: tuple[int, ...], dtype: torch.dtype, smaller_than: Plan | None = None) -> Plan:
        """The largest plan that fits. Raises BadRequest."""
        height, width = (size * self.space.ratio for size in shape[-2:])
        options = plans(height, width, has_tiling=self.space.family.tile is not None)
        options = options if smaller_than is None else options[options.index(smaller_than) + 1 :]
        free, needed = self._free_for(dtype), [0]
        for plan in options:
            needed.append(self.forecast(dtype).decode(shape, plan))
            if needed[-1] <= free:
                return plan
        tiled = f", and {_gib(needed[-1])} in the smallest tiles" if len(options) > 1 else ""
        raise BadRequest(
            f"Decoding latents of shape {list(shape)} takes {_gib(max(needed))} of memory{tiled}; this replica has "
            f"{_gib(free)} for it. Send a smaller batch or picture",
            parameter="shape",
        )

    def check_encode(self, shape: tuple[int, ...]) -> None:
        needed, free = self.forecast(self.encode_dtype).encode(shape), self._free_for(self.encode_dtype)
        if needed > free:
            raise BadRequest(
                f"Encoding pixels of shape {list(shape)} takes {_gib(needed)} of memory; this replica has {_gib(free)} "
                "for it. Send a smaller batch or picture",
                parameter="shape",
            )

    def group_limit(self, shape: tuple[int, ...], plan: Plan) -> int:
        if self._config.batching == "off" or not self.space.family.decodes_batches:
            return 1
        one = self.forecast(self.dtype).decode((1, *shape[1:]), plan)
        return max(shape[0], min(MAX_GROUP, self.free // max(one, 1)))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, plan: Plan = WHOLE) -> Decoded:
        if len(latents) == 1:
            return self._decode_one(latents, plan)
        together = self._attempt(latents, plan, self.dtype)
        if together is not None and _is_finite(together.pixels):
            return together
        del together  # what follows needs its memory
        # Whichever is to blame, the others get what they would have got alone.
        return _joined([self._decode_one(one, plan) for one in torch.split(latents, 1)])

    def _decode_one(self, latents: torch.Tensor, plan: Plan) -> Decoded:
        decoded = self._within_memory(latents, plan, self.dtype)
        if not _is_finite(decoded.pixels) and self.dtype is not torch.float32:
            del decoded
            self.happened("float32")
            decoded = self._within_memory(latents, self._plan(tuple(latents.shape), torch.float32), torch.float32)
        if not _is_finite(decoded.pixels):
            raise BadRequest(
                "The decoder makes NaN or infinity of these latents, in float32 too: are they of this model, and is the "
                "scaling right?",
                parameter="tensor",
            )
        return decoded

    def _within_memory(self, latents: torch.Tensor, plan: Plan, dtype: torch.dtype) -> Decoded:
        """Decode by the plan; out of memory, by one that takes less."""
        while (decoded := self._attempt(latents, plan, dtype)) is None:
            try:
                plan = self._plan(tuple(latents.shape), dtype, smaller_than=plan)
            except BadRequest:
                raise Unavailable(
                    "Out of memory, in the smallest tiles too; try again, or send a smaller picture", retry_after=5
                ) from None
        return decoded

    def _attempt(self, latents: torch.Tensor, plan: Plan, dtype: torch.dtype) -> Decoded | None:
        """Decode by the plan; None where memory ran out."""
        if plan != WHOLE:
            self.happened("tiled")
        model = view(self._model(dtype), plan, self.space.family.tile, self.space.ratio)

        def run() -> torch.Tensor:
            pixels: torch.Tensor = model.decode(self._to_device(latents, dtype), return_dict=False)[0]
            return pixels.to(self.dtype)

        try:
            return Decoded(self._measured(tuple(latents.shape), plan, dtype, run), dtype, plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._ran_out(dtype)
        return None

    def _ran_out(self, dtype: torch.dtype) -> None:
        """After memory ran out. Outside of `except`: until its end the traceback keeps the tensors of the failed run alive."""
        self.happened("out_of_memory")
        self.forecast(dtype).learn_of_failure()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _measured(
        self, shape: tuple[int, ...], plan: Plan, dtype: torch.dtype, run: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What `run` gives. On a GPU the forecast learns from what it took, and from what it could not have."""
        if self.device != "cuda":
            return run()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            return run()
        finally:
            predicted = self.forecast(dtype).decode(shape, plan)
            self.forecast(dtype).learn(predicted, torch.cuda.max_memory_allocated() - before)

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.device == "cpu":
            return tensor.to(dtype)
        return tensor.pin_memory().to(self.device, dtype, non_blocking=True)

    @torch.inference_mode()
    def encode(
        self, pixels: torch.Tensor, mode: SampleMode = SampleMode.SAMPLE, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        try:
            return self._encode(pixels, mode, generator)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._ran_out(self.encode_dtype)
        raise Unavailable("Out of memory; try again, or send a smaller batch or picture", retry_after=5)

    def _encode(self, pixels: torch.Tensor, mode: SampleMode, generator: torch.Generator | None) -> torch.Tensor:
        encoded = self._model(self.encode_dtype).encode(self._to_device(pixels, self.encode_dtype))
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
        return super().encodes if hasattr(self._models[self.dtype], "encode") else None

    @property
    def revision(self) -> str:
        return self._weights.revision


def _joined(decoded: list[Decoded]) -> Decoded:
    """One batch of what was decoded one by one: said to be computed in the widest dtype and the smallest tiles of them."""
    dtype = max((one.dtype for one in decoded), key=lambda one: one.itemsize)
    plan = min((one.plan for one in decoded), key=lambda one: math.inf if one.tile is None else one.tile)
    return Decoded(torch.cat([one.pixels for one in decoded]), dtype, plan)


def _is_finite(pixels: torch.Tensor) -> bool:
    """One pass over the pixels, one number to the host: least and greatest are NaN where anything is."""
    least, greatest = torch.aminmax(pixels)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in the words of any allocator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def load_reason(error: Exception, device: str) -> str:
    """Why weights that are here could not be loaded, in words."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory on {device}: {text[:200] or 'the weights do not fit'}; give it more, or a smaller dtype"
    return f"{type(error).__name__}: {text[:500]}"
