"""Graph rewrites: each one gives what diffusers' own operations give, and really takes their place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from limits import WAIT_S
from remote_vae_serve.engine.memory.estimate import LiveBytes, MemoryEstimator, on_meta
from remote_vae_serve.engine.operation import DECODE, ENCODE, Operation, run_of
from remote_vae_serve.engine.rewrites import kernels
from remote_vae_serve.engine.rewrites.deferred import Deferred, value_of
from remote_vae_serve.engine.rewrites.table import NAMES, rewrites_of, rewriting
from remote_vae_serve.engine.tiling import ONE_BY_ONE, UNTILED
from remote_vae_serve.families.table import latent_space_of

TOLERANCE = 2e-6
"""Of pixels, for each unit of their range: what another order of float32 sums does in a few dozen layers."""
MODELS: dict[str, tuple[type[Any], dict[str, Any], tuple[int, ...]]] = {
    "sd": (
        AutoencoderKL,
        {
            "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        (1, 4, 16, 24),
    ),
    "tiny": (AutoencoderTiny, {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}, (1, 4, 8, 12)),
    "wan": (
        AutoencoderKLWan,
        {"base_dim": 8, "dim_mult": [1, 2, 2], "z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [False, True]},
        (1, 4, 2, 8, 12),
    ),
}  # fmt: skip
TAKES_THE_PLACE_OF = {
    "noop_division": ("sd", {"aten.div.Tensor"}),
    "group_norm_silu": ("sd", {"aten.silu.default"}),
    "rms_norm_silu": ("wan", {"aten.linalg_vector_norm.default", "aten.silu.default"}),
    "folded_upsampling": ("sd", {"aten.upsample_nearest2d.vec"}),
    "causal_padding": ("wan", {"aten.pad.default"}),
    "epilogue": ("tiny", {"aten.relu.default", "aten.add.Tensor"}),
}
"""A model that each rewrite is for, and the operations that are no longer called, or at least more rarely."""


class Called(TorchDispatchMode):  # type: ignore[misc]
    """The names of the operations that torch calls, as often as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels_for_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_IT", 1)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model_class, config, _ = MODELS[name]
    model = model_class(**config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms too: their weights are ones and zeros when they are made
        if parameter.ndim == 1 or parameter.shape[1:].numel() == 1:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    return torch.nn.Module.to(model, dtype)


def latents_of(name: str) -> torch.Tensor:
    return torch.randn(MODELS[name][2], generator=torch.Generator().manual_seed(5))


def run(
    name: str, names: tuple[str, ...], operation: Operation = DECODE, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    model, context = model_of(name, dtype), rewriting(names)
    context.prepare(model)
    space = latent_space_of(type(model).__name__, dict(model.config), model)
    given = latents_of(name).to(dtype)
    if operation is ENCODE:
        given = run_of(DECODE, model, space, dtype)(given)
    with torch.inference_mode():
        return run_of(operation, model, space, torch.float32, rewriting=context)(given)


def is_close(made: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    span = (expected.max() - expected.min()).item()
    return type(made) is torch.Tensor and (made - expected).abs().max().item() <= tolerance * span


@pytest.mark.parametrize("operation", [DECODE, ENCODE], ids=["decode", "encode"])
@pytest.mark.parametrize("alone", [*NAMES, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_each_rewrite_alone_and_all_together_give_what_diffusers_gives(
    name: str, alone: str, operation: Operation
) -> None:
    made = run(name, NAMES if alone == "all" else (alone,), operation)
    assert is_close(made, run(name, (), operation))


@pytest.mark.parametrize("rewrite", TAKES_THE_PLACE_OF)
def test_each_rewrite_takes_the_place_of_operations(rewrite: str) -> None:
    name, replaced = TAKES_THE_PLACE_OF[rewrite]
    counts = []
    for names in ((), ("channels_last",), ("channels_last", rewrite)):
        with Called() as called:
            run(name, names)
        counts.append({one: called.names.count(one) for one in replaced})
    eager, laid_out, rewritten = counts
    assert eager == laid_out
    assert all(rewritten[one] < eager[one] for one in replaced), counts


def test_weights_and_activations_are_channels_last() -> None:
    model = model_of("wan")
    rewriting(("channels_last",)).prepare(model)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 5]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_bfloat16_loses_at_most_two_decibels_more_than_without_rewrites() -> None:
    for name in MODELS:
        exact = run(name, ())
        errors = [(run(name, names, dtype=torch.bfloat16) - exact).square().mean().item() for names in ((), NAMES)]
        assert errors[1] <= 1.6 * errors[0], name  # sums of weights are rounded once more


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 32, 7, 9), (2, 48, 5, 3), (1, 64, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_with_silu_is_torchs(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    given = (
        (40 + 3 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
    )  # far from zero: squares lose digits
    norm = torch.nn.GroupNorm(8, shape[1], eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = functional.silu(norm(given.double().float().contiguous()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with rewriting(("group_norm_silu",)), Called() as called, torch.inference_mode():
            made = functional.silu(norm.to(dtype)(given))
    finally:
        torch.set_num_threads(before)
    assert not {"aten.silu.default", "aten.silu_.default", "aten.native_group_norm.default"} & set(called.names)
    assert made.is_contiguous(memory_format=layout)
    assert (made.float() - expected).abs().max().item() < (1e-4 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(bad: float, dtype: torch.dtype) -> None:
    given = torch.randn(1, 32, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    given[0, 3, 2, 1] = bad
    norm = torch.nn.GroupNorm(8, 32).to(dtype)
    with rewriting(("group_norm_silu",)), torch.inference_mode():
        made = functional.silu(norm(given))
    assert not made[0, 0:4].isfinite().any()
    assert made[0, 4:].isfinite().all()


def test_silu_saturates_as_torchs_does() -> None:
    given = (
        torch.tensor([-1e4, -200.0, -90.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 90.0, 1e4])
        .repeat_interleave(32)
        .reshape(10, 32)
    )
    made, loops = torch.empty_like(given), kernels.compiled()
    assert loops is not None
    loops.affine_silu(given.numpy(), made.numpy(), 0, 10, torch.ones(32).numpy(), torch.zeros(32).numpy())
    assert torch.allclose(made, functional.silu(given), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 7)])
def test_upsampling_is_folded_for_every_size(size: tuple[int, int], mode: str) -> None:
    given, convolution = torch.randn(2, 6, *size), torch.nn.Conv2d(6, 10, 3, padding=1)
    small = functional.interpolate(given, scale_factor=2.0, mode=mode)
    with torch.inference_mode():
        expected = convolution(small)
        with rewriting(("folded_upsampling",)), Called() as called:
            made = convolution(functional.interpolate(given, scale_factor=2.0, mode=mode).to(torch.float32))
    assert "aten.upsample_nearest2d.vec" not in called.names
    assert is_close(made, expected)


def upsampled_otherwise() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    convolution, strided = torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.Conv2d(6, 6, 3, padding=1, stride=2)
    twice = partial(functional.interpolate, scale_factor=2.0, mode="nearest")
    yield lambda x: convolution(functional.interpolate(x, scale_factor=3.0, mode="nearest"))
    yield lambda x: convolution(functional.interpolate(x, scale_factor=2.0, mode="bilinear"))
    yield lambda x: convolution(functional.interpolate(x, size=(9, 9)))
    yield lambda x: strided(twice(x))
    yield lambda x: torch.nn.functional.conv2d(twice(x), torch.ones(6, 1, 3, 3), padding=1, groups=6)
    yield lambda x: twice(x) + 1
    yield lambda x: torch.cat([twice(x), twice(x)])


@pytest.mark.parametrize("work", list(upsampled_otherwise()))
def test_what_a_rewrite_is_not_for_stays_as_it_is(work: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = torch.randn(1, 6, 4, 5)
    with torch.inference_mode():
        expected = work(given)
        with rewriting(NAMES):
            made = value_of(work(given))
    assert is_close(made, expected)


def in_force() -> AbstractContextManager[Any]:
    return rewriting(("epilogue",))


def test_a_tensor_that_waits_can_be_asked_for_its_shape_and_is_computed_once() -> None:
    convolution, given = torch.nn.Conv2d(3, 5, 3, stride=2, dilation=2), torch.randn(1, 3, 15, 17)
    with torch.inference_mode(), in_force(), Called() as called:
        waiting = convolution(given)
        assert (type(waiting), waiting.shape, waiting.ndim, waiting.dtype) == (Deferred, (1, 5, 6, 7), 4, torch.float32)
        assert called.names == []
        twice = waiting * 2 + waiting
    assert called.names.count("aten.conv2d.default") == 1
    with torch.inference_mode():
        assert torch.equal(value_of(twice), convolution(given) * 2 + convolution(given))


def test_what_was_fused_can_be_used_again() -> None:
    convolution, given = torch.nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        with in_force():
            made = convolution(given)
            added = value_of(made + given)
            alone = value_of(made)
        assert is_close(alone, convolution(given))
        assert is_close(added, convolution(given) + given)


def test_what_waits_is_computed_before_its_argument_is_changed() -> None:
    convolution = torch.nn.Conv2d(3, 3, 3, padding=1)
    for change in (lambda x: x.mul_(2), lambda x: x.__setitem__(0, 0.0), lambda x: functional.relu(x, inplace=True)):
        given = torch.randn(1, 3, 8, 8)
        with torch.inference_mode():
            expected = convolution(given)
            with in_force():
                made = convolution(given)
                change(given)
                assert torch.equal(value_of(made), expected)


def test_what_waits_is_computed_by_whoever_asks_after_the_context() -> None:
    convolution, given = torch.nn.Conv2d(3, 3, 3, padding=1), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        with in_force():
            made = convolution(given)
        assert type(made) is Deferred
        assert torch.equal(made + 0, convolution(given))


@pytest.mark.parametrize("operation", [DECODE, ENCODE], ids=["decode", "encode"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_forecast_of_memory_knows_what_rewrites_save(name: str, batch: int, operation: Operation) -> None:
    """Live bytes on the device against the forecast from the graph, each counted for itself."""
    model_class, _, shape = MODELS[name]
    model, context = model_of(name), rewriting(NAMES)
    context.prepare(model)
    space = latent_space_of(model_class.__name__, dict(model.config), model)
    given = torch.randn(batch, *shape[1:])
    if operation is ENCODE:
        given = run_of(DECODE, model, space, torch.float32)(given)
    with LiveBytes() as live, torch.inference_mode():
        run_of(operation, model, space, torch.float32, rewriting=context)(given)
    told = MemoryEstimator(on_meta(model_class, dict(model.config), torch.float32), space, rewrites=NAMES)
    eager = MemoryEstimator(on_meta(model_class, dict(model.config), torch.float32), space)
    forecast = told.of(operation, tuple(given.shape), UNTILED)
    assert live.peak + given.nbytes <= forecast <= 1.25 * (live.peak + given.nbytes) + 2**16
    derived = 2 * told.weights  # folded kernels have 16 taps for 9
    assert forecast <= 1.1 * eager.of(operation, tuple(given.shape), UNTILED) + derived
    assert told.of(operation, tuple(given.shape), ONE_BY_ONE) <= forecast


def test_which_rewrites_an_engine_has() -> None:
    assert rewrites_of("eager", "cpu") == rewrites_of("auto", "cuda") == ()
    assert rewrites_of("fast", "cuda") == rewrites_of("fast", "cpu") == rewrites_of("auto", "cpu") == NAMES


NOWHERE_TO_KEEP = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import torch
from remote_vae_serve.engine.rewrites import kernels
rows = torch.randn(1, 8, 32)
kernels.group_norm_silu(rows, rows, 4, torch.ones(32), torch.zeros(32), 1e-6)
print(kernels.compiled().moments.stats.cache_path)
"""
NO_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from torch.nn import functional
from remote_vae_serve.engine.rewrites.table import NAMES, rewriting
from remote_vae_serve.engine.rewrites.deferred import value_of
norm, given = torch.nn.GroupNorm(8, 64), torch.randn(1, 64, 96, 96).to(memory_format=torch.channels_last)
with torch.inference_mode(), rewriting(NAMES):
    made = value_of(functional.silu(norm(given)))
print(torch.allclose(made, functional.silu(norm(given)), atol=1e-5))
"""


@pytest.mark.parametrize(
    ("code", "printed"), [(NOWHERE_TO_KEEP, "None"), (NO_NUMBA, "True")], ids=["no folder", "no numba"]
)
def test_a_machine_without_a_cache_or_without_numba_decodes_all_the_same(code: str, printed: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (run.returncode, run.stdout.split()) == (0, [printed]), run.stderr
