"""`DiffusersEngine`: a diffusers autoencoder, loaded from safetensors and run within a budget of memory: eagerly, as diffusers
wrote it, or with graph rewrites in force (`engine: fast`)."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import diffusers
import torch

from remote_vae.errors import BadRequest, ModelFailed, RemoteVAEError, Unavailable
from remote_vae.protocol.encode_request import SampleMode
from remote_vae.protocol.hints import Hints
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine import weights
from remote_vae_serve.engine.base import Decoded, Encoded, Engine, Event, NotTogether
from remote_vae_serve.engine.bfloat16_speed import is_bfloat16_faster
from remote_vae_serve.engine.memory.budget import budget
from remote_vae_serve.engine.memory.estimate import MemoryEstimator
from remote_vae_serve.engine.memory.malloc_cache import MallocCache
from remote_vae_serve.engine.memory.out_of_memory import is_out_of_memory, load_reason
from remote_vae_serve.engine.memory.planner import MemoryPlanner, in_gib
from remote_vae_serve.engine.model_config import filled_in, latent_space, statistics_of
from remote_vae_serve.engine.operation import ENCODE, Operation, one_by_one, run_of
from remote_vae_serve.engine.rewrites.rewriting import Rewriting
from remote_vae_serve.engine.rewrites.table import rewrites_of, rewriting
from remote_vae_serve.engine.threads import ThreadCount
from remote_vae_serve.engine.tiling import UNTILED, TilingPlan, view
from remote_vae_serve.families.layouts import NO_HINTS, RequestHints
from remote_vae_serve.processing.finite import is_finite

logger = logging.getLogger("ray.serve")

MAX_BATCH = 8


class DiffusersEngine(Engine):
    """A diffusers autoencoder.

    Args:
        config: the model's arguments.
        device: `cpu` or `cuda`, resolved.
        on_event: as for `Engine`.
    """

    def __init__(
        self, config: VAEConfig, device: str, on_event: Callable[[Event], object] = lambda event: None
    ) -> None:
        super().__init__(on_event)
        self._config = config
        self._models: dict[torch.dtype, Any] = {}
        self._rewrites = rewrites_of(config.engine, device)
        self._rewriting: dict[torch.dtype, Rewriting] = {}
        self._distribution: type[Any] | None = None
        self._cache = MallocCache()
        self._threads = ThreadCount(config)
        self.device = device

    def load(self) -> None:
        torch.set_num_threads(self._threads.most)
        self._weights = weights.fetch(self._config)
        self.model_config = filled_in(self._weights.config(), self._config.source)
        self.space = latent_space(self._weights.config(), self._config.source, self._config.config)
        self.hints = Hints.from_plain(self._config.hints)
        self._choose_dtypes()
        model_class = getattr(diffusers, self.space.class_name)
        memory = budget(self._config, self.device)
        self.planner = MemoryPlanner(
            model_class, self.model_config, self.space, self.dtype, self._models.keys(), memory, self._rewrites
        )
        if self.device == "cpu" and self._config.memory == "auto":
            logger.info(
                "%s may take %s, nearly all that is free on this host now; where replicas share it, give each its own `memory`",
                self._config.source, in_gib(memory),
            )  # fmt: skip
        if self.planner.free <= 0:
            alone = in_gib(self.planner.estimator(self.dtype).weights)
            raise ModelFailed(
                f"{self._config.source} takes {alone} for its weights alone, and `memory` "
                f"leaves this replica {in_gib(memory)}; give it more"
            )
        self.space = self.space.with_statistics_of(self._model(self.dtype))
        self.buffers = statistics_of(self._model(self.dtype))
        for shape in self._config.warm_up:
            self._warm_up(shape)

    def _warm_up(self, shape: tuple[int, ...]) -> None:
        zeros = torch.zeros(shape)
        try:
            hints = RequestHints.merged(self.hints)
            layout = self.space.family.layout_of(zeros, self.space, hints)
            latents = layout.unpack(zeros, self.space, hints).to(self.dtype)
            self.decode(latents, self.plan_decode(tuple(latents.shape), hints), hints)
        except RemoteVAEError as error:
            raise ModelFailed(f"warm_up {list(shape)}: {error.message}") from error
        except Exception as error:  # out of the constructor it would have Serve start the replica again for ever
            raise ModelFailed(f"warm_up {list(shape)}: {load_reason(error, self.device)}") from error

    def _choose_dtypes(self) -> None:
        """Those of the configuration; never float16 for a model whose config says that it overflows in it."""
        config, family = self._config, self.space.family

        def resolve(chosen: str, safe: Callable[[], torch.dtype]) -> torch.dtype:
            dtype: torch.dtype = safe() if chosen == "auto" else getattr(torch, chosen)
            return torch.float32 if dtype is torch.float16 and self.space.force_upcast else dtype

        self.dtype = resolve(config.dtype, lambda: family.safe_dtype(self.space, self.device, is_bfloat16_faster))
        self.encode_dtype = resolve(
            config.encode_dtype, lambda: family.safe_encode_dtype(self.space, self.device, self.dtype)
        )
        logger.info("%s decodes in %s and encodes in %s", config.source, self.dtype, self.encode_dtype)

    def _model(self, dtype: torch.dtype) -> Any:
        """The model in that dtype, loaded when it is first asked for: who only decodes in one never pays for another."""
        if dtype not in self._models:
            self._models[dtype] = self._load(dtype)
            self._rewriting[dtype] = rewriting(self._rewrites)
            self._rewriting[dtype].prepare(self._models[dtype])
        return self._models[dtype]

    def _load(self, dtype: torch.dtype) -> Any:
        try:
            vae, loaded = getattr(diffusers, self.space.class_name).from_pretrained(
                self._weights.folder, variant=self._config.variant, torch_dtype=dtype, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
            if loaded["missing_keys"]:
                raise ValueError(f"its safetensors lack {', '.join(sorted(loaded['missing_keys'])[:3])}")
            integers = self._weights.integers(self._config)
            for name, tensor in vae.state_dict().items():
                if name in integers and tensor.is_floating_point():  # diffusers would take the integers for the weights
                    raise ValueError(f"{name} is stored as {integers[name]}; expected weights of a floating dtype")
            return vae.to(self.device).eval().requires_grad_(False)
        except Exception as error:  # whatever the loading code raises becomes a reason that clients see
            raise ModelFailed(
                f"{self._config.source} could not be loaded: {load_reason(error, self.device)}"
            ) from error

    def on_device(self) -> AbstractContextManager[object]:
        # A stream of its own: copies of one result and the decode of the next do not wait for each other.
        return torch.cuda.stream(torch.cuda.Stream()) if self.device == "cuda" else nullcontext()  # type: ignore[no-untyped-call]

    def on_idle(self) -> None:
        self._cache.give_back()

    def plan_decode(self, shape: tuple[int, ...], hints: RequestHints = NO_HINTS) -> TilingPlan:
        return self.planner.plan(Operation("decode", hints), shape, self.dtype)

    def plan_encode(self, shape: tuple[int, ...]) -> TilingPlan:
        return self.planner.plan(ENCODE, shape, self.encode_dtype)

    def batch_limit(self, shape: tuple[int, ...], plan: TilingPlan, hints: RequestHints = NO_HINTS) -> int:
        if self._config.batching == "off":
            return 1
        return self.planner.batch_limit(Operation("decode", hints), shape, plan, MAX_BATCH)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, plan: TilingPlan = UNTILED, hints: RequestHints = NO_HINTS) -> Decoded:
        operation = Operation("decode", hints)
        decoded = self._decode(operation, latents, plan, self.dtype)
        if is_finite(decoded.pixels):
            return decoded
        plan = decoded.plan
        del decoded  # what follows needs its memory
        if len(latents) == 1:
            return self._decode_in_float32(operation, latents, latents.shape)
        return self._decode_apart(operation, latents, plan)

    @torch.inference_mode()
    def decode_together(self, latents: torch.Tensor, plan: TilingPlan, hints: RequestHints = NO_HINTS) -> Decoded:
        pixels = self._attempt(Operation("decode", hints), latents, plan, self.dtype)
        if pixels is None or not is_finite(pixels):
            raise NotTogether
        return Decoded(pixels, self.dtype, plan)

    def _decode_apart(self, operation: Operation, latents: torch.Tensor, plan: TilingPlan) -> Decoded:
        """A batch some of which is not finite: whichever it is, the others get what they would have got alone."""
        dtypes, used = [self.dtype], [plan]

        def one(sample: torch.Tensor, number: int = 0) -> torch.Tensor:
            alone = operation.of_sample(number)
            decoded = self._decode(alone, sample, plan.each, self.dtype)
            if not is_finite(decoded.pixels):
                del decoded
                decoded = self._decode_in_float32(alone, sample, latents.shape)
            dtypes.append(decoded.dtype)
            used.append(decoded.plan)
            return decoded.pixels

        pixels = one_by_one(one, latents)
        smallest = min(used, key=lambda plan: math.inf if plan.tile is None else plan.tile)
        return Decoded(pixels, max(dtypes, key=lambda dtype: dtype.itemsize), smallest)

    def _decode_in_float32(self, operation: Operation, sample: torch.Tensor, batch: tuple[int, ...]) -> Decoded:
        """A sample of a batch of that shape, whose pixels so far need room beside it."""
        if self.dtype is not torch.float32:
            self.on_event("float32")
            plan = self.planner.plan(operation, tuple(batch), torch.float32, UNTILED if batch[0] > 1 else None)
            decoded = self._decode(operation, sample, plan.each, torch.float32)
            if is_finite(decoded.pixels):
                return decoded
        raise BadRequest(
            "The decoder makes NaN or infinity of these latents, in float32 too: are they of this model, and is the "
            "scaling right?",
            parameter="tensor",
        )

    def _decode(self, operation: Operation, latents: torch.Tensor, plan: TilingPlan, dtype: torch.dtype) -> Decoded:
        pixels, plan = self._within_memory(operation, latents, plan, dtype)
        return Decoded(pixels, dtype, plan)

    def _within_memory(
        self, operation: Operation, batch: torch.Tensor, plan: TilingPlan, dtype: torch.dtype
    ) -> tuple[torch.Tensor, TilingPlan]:
        """Run the operation by the plan; out of memory, by one that takes less. With the plan that it was."""
        while (made := self._attempt(operation, batch, plan, dtype)) is None:
            try:
                plan = self.planner.plan(operation, tuple(batch.shape), dtype, plan)
            except BadRequest:
                raise Unavailable(
                    "Out of memory, in the smallest tiles too; try again, or send a smaller picture", retry_after=5
                ) from None
        return made, plan

    def _attempt(
        self, operation: Operation, batch: torch.Tensor, plan: TilingPlan, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """What is made by the plan; None where memory ran out."""
        if plan.tile is not None:
            self.on_event("tiled")
        estimator, model = self.planner.estimator(dtype), self._model(dtype)
        needed = estimator.of(operation, tuple(batch.shape), plan)
        free = self.planner.free_for(dtype)
        self.pending.wait(free - needed)
        self._cache.prepare((operation.unseeded, batch.shape[1:], plan, dtype), needed, free)
        seen = view(model, plan, self.space.family.tile, self.space.ratio)
        run = run_of(operation, seen, self.space, self.dtype, self._found, self._rewriting[dtype])
        try:
            with self._at_work(estimator, needed), self.abandonment.at_each(getattr(seen, operation.part, None)):
                given = self._to_device(batch, dtype)
                return one_by_one(run, given) if plan.one_by_one else run(given)
        except Exception as error:
            if (recover := self.space.family.recover) is not None:
                recover(model)
            if not is_out_of_memory(error):
                raise
        # Outside of `except`: until its end the traceback keeps the tensors of the failed run alive.
        self.on_event("out_of_memory")
        estimator.learn_of_failure()
        gc.collect()
        self._cache.give_back()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return None

    @contextmanager
    def _at_work(self, estimator: MemoryEstimator, predicted: int) -> Iterator[None]:
        """On a CPU work has its share of the threads; on a GPU the forecast learns from what it took, and could not have."""
        if self.device != "cuda":
            with self._threads.shared():
                yield
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            estimator.learn(predicted, torch.cuda.max_memory_allocated() - before)

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.device == "cpu":
            return tensor.to(dtype)
        return tensor.pin_memory().to(self.device, dtype, non_blocking=True)

    @torch.inference_mode()
    def encode(
        self,
        pixels: torch.Tensor,
        mode: SampleMode = SampleMode.SAMPLE,
        generator: torch.Generator | None = None,
        plan: TilingPlan = UNTILED,
    ) -> Encoded:
        seeded = None if generator is None else generator.get_state()
        encoded = self._encode(pixels, plan, self.encode_dtype, mode, generator)
        if not is_finite(encoded.latents) and self.encode_dtype is not torch.float32:
            del encoded  # what follows needs its memory
            self.on_event("float32")
            if generator is not None and seeded is not None:
                generator.set_state(seeded)
            plan = self.planner.plan(ENCODE, tuple(pixels.shape), torch.float32)
            encoded = self._encode(pixels, plan, torch.float32, mode, generator)
        if not is_finite(encoded.latents):
            raise BadRequest(
                "The encoder makes NaN or infinity of this picture, in float32 too: are its pixels from -1 to 1?",
                parameter="image",
            )
        return encoded

    def _found(self, distribution: type[Any]) -> None:
        self._distribution = distribution

    def _encode(
        self,
        pixels: torch.Tensor,
        plan: TilingPlan,
        dtype: torch.dtype,
        mode: SampleMode,
        generator: torch.Generator | None,
    ) -> Encoded:
        latents, plan = self._within_memory(ENCODE, pixels, plan, dtype)
        if self._distribution is not None and mode is not SampleMode.MOMENTS:
            # torch draws some of the noise otherwise in bfloat16: where nobody asked for that, a seed gives what float32 gives.
            unasked = self.device == "cpu" and self._config.encode_dtype == "auto"
            distribution = self._distribution(latents.float() if unasked else latents)
            drawn = distribution.sample(generator) if mode is SampleMode.SAMPLE else distribution.mode()
            latents = drawn.to(dtype)
        return Encoded(latents, dtype, plan)

    @property
    def encodes(self) -> Literal["moments", "latents"] | None:
        return super().encodes if hasattr(self._models[self.dtype], "encode") else None

    @property
    def revision(self) -> str:
        return self._weights.revision
