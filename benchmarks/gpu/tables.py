"""The results as Markdown: the tables of the Remote VAE announcement for one card, and what is behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.gpu.models import MODELS
from benchmarks.gpu.rates import rate_of
from benchmarks.gpu.results import Results
from benchmarks.gpu.stages import STAGES

GIB = 2**30
COLUMNS = "https://huggingface.co/docs/diffusers/hybrid_inference/vae_decode"
NONE = "-"
AS_PREDICTED = ("eager", "cudnn_benchmark")
"""Ways whose tensors are those of the prediction: no copies into another layout, nothing fused."""
FP32_NOTE = {
    "tf32": "float32 is torch's own: convolutions in TF32, all else in full; its share is of the `tf32` rate.",
    "float32": "float32 is in full throughout; its share is of the `float32` rate.",
}


class Decode:
    """A row: one decode, with what was predicted for it and the rate it is held against."""

    def __init__(self, key: str, results: Results) -> None:
        _, self.model, self.size, self.dtype, self.way, self.extent = key.split("/")
        self.found = results.records[key]
        self.failed: str | None = self.found.get("failed")
        predicted = results.records.get(f"predict/{self.model}/{self.size}/{self.dtype}/{self.extent}", {})
        rate = results.records.get(f"matmul/{rate_of(self.dtype, results.about['device'])}", {})
        self.flops, self.rate = predicted.get("flops"), rate.get("tflops")
        self.predicted: int | None = predicted.get("peak_bytes")
        self._card = results.about["memory_bytes"]

    def seconds(self) -> str:
        return "failed" if self.failed else f"{self.found['ms']['median'] / 1e3:.4f}"

    def memory(self) -> tuple[str, str]:
        """What the card must have for it, weights included: GiB, and per cent of this one."""
        if "peak_bytes" not in self.found:
            return NONE, NONE
        total = self.found["weights_bytes"] + self.found["peak_bytes"]
        return f"{total / GIB:.2f}", f"{100 * total / self._card:.1f}"

    def speed(self) -> tuple[str, str]:
        """TFLOP/s, and per cent of the matmul rate."""
        if self.failed or self.flops is None:
            return NONE, NONE
        tflops = self.flops / self.found["ms"]["median"] / 1e9
        return f"{tflops:.1f}", NONE if self.rate is None else f"{100 * tflops / self.rate:.0f}"

    def difference(self) -> tuple[str, str]:
        apart = self.found["difference"]
        if not apart["finite"]:
            return "not finite", "not finite"
        return "equal" if apart["psnr_db"] is None else f"{apart['psnr_db']:.1f}", f"{apart['max']:.2g}"


def render(results: Results) -> str:
    """All of it."""
    decodes = [Decode(key, results) for key in results.records if key.startswith("decode/")]
    parts = [
        *_head(results), *_announcement(decodes, results.about["card"]), *_ways(decodes, results), *_stages(results),
        *_rates(results), *_failures(results),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _head(results: Results) -> Iterator[str]:
    about = results.about
    yield f"# Decoding on {about['card']}\n"
    if about["tiny"]:
        yield "**A run of tiny models, to see that everything runs. None of these numbers means anything.**\n"
    card = (
        "" if about["driver"] is None else f"driver {about['driver']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}, "
    )
    yield (
        f"`python -m benchmarks.gpu` at {about['commit']}, {about['date']}: {about['card']}, "
        f"{about['memory_bytes'] / GIB:.0f} GiB, {card}torch {about['torch']}, diffusers {about['diffusers']}, "
        f"Python {about['python']}.\n"
    )
    yield (
        "Full-size models with random weights, one image or video at a time, medians after a warm-up. Memory is the most that "
        "was allocated at one time, the weights of decoder and encoder among it. Tiles are of the size that each model's "
        "configuration gives: SDXL's and Flux.1's are 1024 pixels, so that their tiled decode of 1024x1024 is the whole one. "
        + FP32_NOTE[rate_of("float32", about["device"]) if about["cudnn_allow_tf32"] else "float32"]
        + "\n"
    )
    if results.interrupted:
        yield f"Time ran out for: {', '.join(results.interrupted)}.\n"


def _announcement(decodes: Sequence[Decode], card: str) -> Iterator[str]:
    yield "## Time and memory\n"
    yield f"Eager, in the columns of [the Remote VAE documentation]({COLUMNS}).\n"
    eager = {(d.model, d.dtype, d.size, d.extent): d for d in decodes if d.way == "eager"}
    for model in MODELS:
        rows = []
        cells = dict.fromkeys((d.dtype, d.size) for d in decodes if d.model == model.name and d.way == "eager")
        for dtype, size in sorted(
            cells, key=lambda cell: (model.dtypes.index(cell[0]), [int(n) for n in cell[1].split("x")])
        ):
            whole, tiled = (eager.get((model.name, dtype, size, extent)) for extent in ("whole", "tiled"))
            columns = [(d.seconds(), *d.memory()) if d else (NONE,) * 3 for d in (whole, tiled)]
            rows.append([card, size, dtype, *columns[0], *columns[1]])
        if rows:
            yield f"### {model.title}\n\nConfiguration: {model.source}.\n"
            yield from _table(
                ["card", "resolution", "dtype", "time, s", "memory, GiB", "memory, %", "tiled time, s", "tiled memory, GiB",
                 "tiled memory, %"], rows,
            )  # fmt: skip


def _ways(decodes: Sequence[Decode], results: Results) -> Iterator[str]:
    done = [d for d in decodes if not d.failed]
    if not done:
        return
    yield "## Ways to run them\n"
    yield (
        "Activations: the most allocated beside the weights. Predicted: the same from the meta device, where nothing is "
        "computed. PSNR and greatest difference are from a whole decode of the same weights in full float32 on the same "
        "device, for pixels in [-1, 1]; a tiled decode differs by its seams and by norms over less. Compiled: graphs, graph "
        "breaks, and seconds of the first call.\n"
    )
    rows = []
    for d in done:
        ms, compiled, reserved = d.found["ms"], d.found.get("compile"), d.found.get("reserved_bytes")
        made = f"{compiled['graphs']}, {compiled['breaks']}, {compiled['first_call_s']:.0f} s" if compiled else NONE
        rows.append([
            d.model, d.size, d.dtype, d.way + (", tiled" if d.extent == "tiled" else ""), f"{ms['median']:.2f}",
            f"{ms['least']:.2f} to {ms['most']:.2f}, {ms['count']}", *d.speed(), _mib(d.found.get("peak_bytes")),
            _mib(d.predicted if d.way in AS_PREDICTED else None), _mib(reserved), *d.difference(), made,
        ])  # fmt: skip
    yield from _table(
        ["model", "size", "dtype", "way", "ms", "range, runs", "TFLOP/s", "% of matmul", "activations, MiB", "predicted, MiB",
         "reserved, MiB", "PSNR, dB", "greatest difference", "compiled"], rows,
    )  # fmt: skip
    settings = {f"{c['backend']}, mode={c['mode']}" for d in done if (c := d.found.get("compile"))}
    if settings:
        yield f"torch.compile of the decoder: {'; '.join(sorted(settings))}, dynamic=False.\n"


def _stages(results: Results) -> Iterator[str]:
    found = {k: r for k, r in results.records.items() if k.startswith("stages/") and "failed" not in r}
    if not found:
        return
    yield "## From latent bytes to JPEG bytes\n"
    yield (
        "Medians in ms by the host's clock, each stage waited for; `all` in one go. Latents lie on the host as bytes; what comes "
        "back is uint8, into pinned memory. JPEG: quality 90, 4:2:0. Videos end on the host.\n"
    )
    rows = []
    for key, record in found.items():
        _, model, size, dtype = key.split("/")
        each = [f"{record['stages_ms'][s]['median']:.3f}" if s in record["stages_ms"] else NONE for s in STAGES]
        by, kib = (record["jpeg_by"], f"{record['jpeg_bytes'] / 1024:.0f}") if record["jpeg_bytes"] else (NONE, NONE)
        rows.append([model, size, dtype, *each, f"{record['whole_ms']['median']:.3f}", by, kib])
    yield from _table(["model", "size", "dtype", *STAGES, "all", "JPEG by", "JPEG, KiB"], rows)


def _rates(results: Results) -> Iterator[str]:
    found = {k.split("/")[1]: r for k, r in results.records.items() if k.startswith("matmul/") and "failed" not in r}
    if not found:
        return
    yield "## The card's own rate\n"
    yield "The product of two square matrices of random numbers, by torch.\n"
    rows = [[name, str(r["edge"]), f"{r['ms']['median']:.3f}", f"{r['tflops']:.1f}"] for name, r in found.items()]
    yield from _table(["numbers", "edge", "ms", "TFLOP/s"], rows)


def _failures(results: Results) -> Iterator[str]:
    failed = {key: record["failed"] for key, record in results.records.items() if "failed" in record}
    if failed:
        yield "## What failed\n"
        yield from _table(["what", "reason"], [[key, reason.replace("|", "\\|")] for key, reason in failed.items()])


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _mib(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**20:.1f}"
