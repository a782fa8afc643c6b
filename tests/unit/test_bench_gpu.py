"""The GPU benchmark counts what it says it counts, survives being cut off, and runs where there is neither GPU nor Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu.__main__ import do, run  # noqa: E402
from benchmarks.gpu.clock import Clock  # noqa: E402
from benchmarks.gpu.decodes import WAYS, Bench, Compiler, difference, is_wrong  # noqa: E402
from benchmarks.gpu.meter import Meter, Prediction  # noqa: E402
from benchmarks.gpu.models import MODELS, Model, Size, tiny  # noqa: E402
from benchmarks.gpu.results import Results, slug  # noqa: E402
from benchmarks.gpu.stages import to_uint8  # noqa: E402
from benchmarks.gpu.tables import render  # noqa: E402
from benchmarks.gpu.works import Work, works  # noqa: E402

from remote_vae_serve.processing import postprocess  # noqa: E402

MIB = 2**20
BY_NAME = {model.name: model for model in MODELS}
TINY = {name: tiny(model) for name, model in BY_NAME.items()}
ABOUT: dict[str, Any] = {
    "card": "CPU", "memory_bytes": 2**34, "driver": None, "cuda": None, "cudnn": None, "torch": "2", "diffusers": "0",
    "python": "3", "threads": 1, "cudnn_allow_tf32": True, "commit": "abc", "date": "2026-01-01", "device": "cpu",
    "tiny": True, "compile_mode": "default",
}  # fmt: skip


def bench() -> Bench:
    return Bench("cpu", Clock("cpu", least=1, most=2, seconds=0.01, warm_up_s=0), Compiler("eager"))


def test_bytes_are_counted_while_something_holds_them() -> None:
    there = torch.ones(MIB)  # 4 MiB of float32
    with Meter(known=[there]) as meter:
        first = there + 1
        view = first.view(1024, -1)
        second = view * 2
        del first, view
        third = second.t() + 1
        assert (meter.now, meter.peak) == (8 * MIB, 8 * MIB)
        del second, third
        assert meter.now == 0


def test_weights_and_their_views_do_not_count() -> None:
    linear = torch.nn.Linear(512, 512)
    with torch.inference_mode(), Meter(known=linear.parameters()) as meter:
        linear(torch.ones(1, 512))
    assert meter.peak < 512 * 512 * 4


@pytest.mark.parametrize("name", [pytest.param("sd15", marks=pytest.mark.slow), "hunyuan", "wan"])
@pytest.mark.parametrize("tiled", [False, True])
def test_the_prediction_is_what_a_cpu_needs_and_computes(name: str, tiled: bool) -> None:
    model, dtype = TINY[name], "float32"
    shape = model.latent_shape(model.sizes[-1])
    on_meta, vae = model.build(dtype, "meta"), model.build(dtype, "cpu")
    if tiled:
        on_meta.enable_tiling()
        vae.enable_tiling()
    predicted, latents = Prediction(on_meta, shape, torch.float32), torch.randn(shape)
    with torch.inference_mode(), Meter(known=(*vae.parameters(), *vae.buffers(), latents)) as meter:
        vae.decode(latents, return_dict=False)
    assert meter.peak == pytest.approx(predicted.peak, rel=0.02)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        on_meta.decode(torch.empty(shape, device="meta"), return_dict=False)
    assert predicted.flops == counter.get_total_flops()


def test_stable_diffusion_at_1024_is_ten_and_a_half_tflop_and_1_5_gib_in_float16() -> None:
    model = BY_NAME["sd15"]
    predicted = Prediction(model.build("float16", "meta"), model.latent_shape(Size(1024, 1024)), torch.float16)
    assert predicted.flops == 10_470_392_594_432
    assert 1.4 < predicted.peak / 2**30 < 1.6


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_configurations_build_what_the_checkpoints_hold(model: Model) -> None:
    parameters = sum(weight.numel() for weight in model.build(model.dtypes[0], "meta").parameters())
    millions = {"sd15": 83.65, "sdxl": 83.65, "flux": 83.82, "hunyuan": 246.48, "wan": 126.89}
    assert parameters / 1e6 == pytest.approx(millions[model.name], abs=0.01)


def test_bytes_leave_the_device_as_the_server_makes_them() -> None:
    for shape in ((1, 3, 16, 24), (1, 3, 5, 16, 24)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            pixels = torch.randn(shape).to(dtype)
            assert torch.equal(to_uint8(pixels), postprocess.to_uint8(pixels))


def test_pixels_that_are_equal_rounded_or_wrong_are_told_apart() -> None:
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert difference(pixels, pixels)["psnr_db"] is None
    rounded = difference(pixels.bfloat16().float(), pixels)
    assert rounded["psnr_db"] > 40
    found = {"difference": difference(pixels, -pixels)}
    assert is_wrong(found)
    assert not is_wrong({"difference": rounded})
    assert is_wrong({"difference": difference(pixels * float("nan"), pixels)})


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_every_way_decodes_as_float32_does(way: Any) -> None:
    model = TINY["sd15"]
    found = bench().decode(model, "float16", model.sizes[1], way, tiled=False)
    assert not is_wrong(found)
    assert found["ms"]["median"] > 0
    assert ("peak_bytes" in found) == (not way.compiled)
    if way.compiled:
        assert found["compile"]["graphs"] >= 1


def test_a_video_decoder_with_convolutions_of_pictures_runs_channels_last() -> None:
    model = TINY["wan"]
    assert not is_wrong(bench().decode(model, "bfloat16", model.sizes[0], WAYS["channels_last"], tiled=False))


def test_the_most_valuable_work_comes_first_and_none_comes_twice() -> None:
    keys = [work.key for work in works(MODELS, list(WAYS))]
    assert len(keys) == len(set(keys))
    decodes = [key for key in keys if key.startswith("decode/")]
    sd = "decode/sd15/1024x1024/float16"
    assert decodes[:4] == [f"{sd}/eager/whole", f"{sd}/eager/tiled", f"{sd}/channels_last/whole", f"{sd}/compile/whole"]
    assert keys.index("decode/sdxl/1024x1024/float32/eager/whole") < keys.index(
        "decode/flux/1024x1024/bfloat16/eager/whole"
    )
    assert keys.index("decode/sd15/2048x2048/float16/eager/tiled") < keys.index(
        "decode/wan/832x480x81/float32/eager/whole"
    )
    for model in MODELS:
        for way in ("eager", "channels_last", "compile"):
            assert all(f"decode/{model.name}/{size}/{model.dtypes[0]}/{way}/whole" in keys for size in model.sizes)


def test_what_fails_is_a_result_with_its_reason(tmp_path: Path) -> None:
    def fail(bench: Bench) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate | a lot\nand more")

    work = Work("decode/sd15/1024x1024/float16/eager/whole", fail)
    results = Results(tmp_path / "x.json", ABOUT)
    results.add(work.key, do(work, bench()))
    page = render(results)
    assert f"| {work.key} | OutOfMemoryError: CUDA out of memory. Tried to allocate \\| a lot |" in page
    assert "| CPU | 1024x1024 | float16 | failed | - | - | - | - | - |" in page


def test_time_that_runs_out_costs_one_work_only_and_it_comes_last_next_time(tmp_path: Path) -> None:
    done: list[str] = []

    def quick(name: str) -> Work:
        return Work(name, lambda bench: done.append(name) or {})  # type: ignore[func-returns-value]

    def endless(bench: Bench) -> dict[str, Any]:
        while True:
            pass

    import time

    path = tmp_path / "x.json"
    left = run(
        [quick("a"), Work("b", endless), quick("c")], bench(), Results(path, ABOUT), time.monotonic() + 0.3, None
    )
    assert (done, left) == (["a"], 2)
    results = Results.resumed(path, ABOUT | {"date": "2026-01-02"})
    assert results.interrupted == ["b"]
    assert run([quick("a"), quick("b"), quick("c")], bench(), results, None, None) == 0
    assert done == ["a", "c", "b"]
    assert json.loads(path.read_text())["interrupted"] == []


def test_results_of_another_machine_are_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    Results(path, ABOUT).add("a", {})
    with pytest.raises(SystemExit, match="its card is 'CPU', and here it is 'NVIDIA H200'"):
        Results.resumed(path, ABOUT | {"card": "NVIDIA H200"})
    assert Results.resumed(path, ABOUT | {"commit": "def"}).about["commit"] == "abc, resumed at def"


def test_a_card_names_its_file() -> None:
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


@pytest.mark.slow
def test_the_whole_of_it_runs_on_a_cpu_in_two_parts_without_ray(tmp_path: Path) -> None:
    out, tables = tmp_path / "run", "benchmarks/results"
    before = sorted(path.name for path in (ROOT / tables).iterdir())
    without_ray = (
        "import sys, runpy; sys.modules['ray'] = None; sys.modules['remote_vae_serve'] = None\n"
        "sys.argv[0] = 'gpu'; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        without_ray,
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "flux",
        "--out",
        str(out),
        "--resume",
    ]
    first = subprocess.run([*command, "--ways", "channels_last"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    done = json.loads(Path(f"{out}.json").read_text())["records"]
    second = subprocess.run(
        [*command, "--ways", "eager,compile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr
    records = json.loads(Path(f"{out}.json").read_text())["records"]
    assert done.items() < records.items()
    assert not [key for key, record in records.items() if "failed" in record]
    page = Path(f"{out}.md").read_text()
    assert page in second.stdout
    assert "A run of tiny models" in page
    for title in ("### Flux.1", "## Ways to run them", "## From latent bytes to JPEG bytes", "## The card's own rate"):
        assert title in page
    assert sorted(path.name for path in (ROOT / tables).iterdir()) == before


@pytest.mark.slow  # a process that imports all there is
def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "--device cpu --tiny" in answer.stderr
