"""`remote-vae`: the client from a shell. Results go to standard output, sentences and progress to standard error."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import click
from PIL import Image

from remote_vae.cli import benchmark, files, options, runs, tensor_files
from remote_vae.cli.files import STDIO, FileError
from remote_vae.cli.outputs import Outputs
from remote_vae.cli.runs import Made, Run
from remote_vae.cli.tensor_files import UnreadableTensor
from remote_vae.errors import BadRequest, RemoteVAEError, UnknownModel, UnknownRoute
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.hints import ENCODE_PARAMETERS, Hints
from remote_vae.protocol.model_description import ModelDescription
from remote_vae.protocol.output import IMAGES, Output
from remote_vae.protocol.tensors import LATENT_DTYPES, RawTensor, to_numpy
from remote_vae.protocol.wire import Scaling
from remote_vae.transports.transport import IN_FLIGHT

TENSORS = tuple(suffix[1:] for suffix in tensor_files.SUFFIXES)
PICTURES = tuple(image.value for image in IMAGES)
DECODED = (*PICTURES, "mp4", *TENSORS)


class Commands(click.Group):
    """Says every failure in one sentence, or as JSON where that was asked for, with its exit code."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        arguments = args[0] if args else extra.get("args")
        as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
        try:
            sys.exit(super().main(*args, **extra | {"prog_name": "remote-vae", "standalone_mode": False}))
        except click.ClickException as error:
            sentence, context = error.format_message(), getattr(error, "ctx", None)
            if context is not None and "\n" not in sentence:  # the help that a bare `remote-vae` gives needs no hint
                sentence = f"{sentence.rstrip('.')} (see {context.command_path} --help)"
            failure: dict[str, Any] = {"error": sentence, "code": "usage"}
            code = error.exit_code
        except (RemoteVAEError, FileError) as error:
            failure, code = runs.as_fields(error), runs.exit_code([error])
        except click.Abort:
            click.echo("Stopped.", err=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's loop stops too, and no thread is waited for
            signal.raise_signal(signal.SIGINT)
        if as_json:
            click.echo(json.dumps(failure))
        else:
            request_id = f" (request {failure['request_id']})" if "request_id" in failure else ""
            click.echo(failure["error"] + request_id, err=True)
        sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="remote-vae", message="%(prog)s %(version)s")
def main() -> None:
    """Decode latents, and encode pictures, on a remote-vae server.

    ENDPOINT is the URL of a model; with REMOTE_VAE_ENDPOINT in the environment it may be left out.

    \b
    Example: remote-vae decode http://127.0.0.1:8000/demo latent.safetensors -o picture.png

    \b
    Exit codes: 0  all went well
                1  an input failed, or all of them
                2  the command is wrong
                3  the server cannot be reached or is not available: try later
              130  Ctrl-C
    """


@main.command(short_help="Make pictures, videos or tensors of latents.")
@click.argument("arguments", nargs=-1, metavar="[ENDPOINT] LATENTS...")
@options.inputs_and_outputs(DECODED, "png, or mp4 of video latents")
@options.scaling_options
@options.size_options
@click.option("--fps", type=click.FloatRange(1, 240), help="Frames a second of an mp4.  [default: the model's own]")
@options.hint_option()
@options.connection()
def decode(
    arguments: tuple[str, ...], output: str | None, kind: str | None, key: str | None, force: bool, skip_existing: bool,
    concurrency: int, scaling: str | None, scaling_factor: float | None, shift_factor: float | None, height: int | None,
    width: int | None, fps: float | None, hints: Hints, as_json: bool, **server: Any,
) -> None:  # fmt: skip
    """Make pictures, videos or tensors of LATENTS: .safetensors, .npy or .pt (never unpickled), folders of them, or -.

    A file with several images becomes several files, numbered; so do the frames of a video where pictures are asked for.
    npy, safetensors and pt hold what the decoder puts out: -1 to 1, not clamped. Nothing is overwritten without --force.

    \b
    Example: remote-vae decode http://127.0.0.1:8000/demo latent.safetensors -o picture.png
    Example: remote-vae decode http://127.0.0.1:8000/demo latents/ -o pictures/ --format jpg
    """
    endpoint, sources = options.endpoint_and_files(arguments, files.TENSOR_SUFFIXES)
    scaled = options.scaling(scaling, scaling_factor, shift_factor)
    outputs = _outputs(output, kind, DECODED, sources, as_json)
    transport = options.transport(endpoint, concurrency * IN_FLIGHT, **server)

    def work(source: Path) -> Made:
        latents = files.read_tensor(source, key)
        is_video = len(latents.shape) == 5 or (hints.num_frames or 1) > 1
        made = outputs.kind or ("mp4" if is_video else "png")
        as_frames = is_video and made in PICTURES
        of_reply = Output.UINT8 if as_frames else Output.PT if made in TENSORS else Output(made)
        request = DecodeRequest(latents, scaled, of_reply, height, width, fps, hints)
        is_batch = len(latents.shape) > 3 or None not in (height, width)
        requests = [request]
        if is_batch and made not in TENSORS:  # a file that is no tensor holds one of them
            requests = request.samples()
        if not as_frames and _is_done(source, outputs.paths(source, made, len(requests)), force, skip_existing):
            return []
        with runs.waiting_line(len(sources)) as on_wait:
            results = transport.send(requests, on_wait)
        if as_frames:
            contents = [_picture(pixels, made) for result in results for pixels in to_numpy(result.tensor)]
        elif made in TENSORS:
            contents = [_tensor_file(results[0].tensor, made)]
        else:
            contents = [result.data.tobytes() for result in results]
        paths = outputs.paths(source, made, len(contents))
        return (
            []
            if as_frames and _is_done(source, paths, force, skip_existing)
            else list(zip(paths, contents, strict=True))
        )

    with closing(transport):
        _run(Run(sources), work, concurrency, as_json)


@main.command(short_help="Make latents of pictures.")
@click.argument("arguments", nargs=-1, metavar="[ENDPOINT] PICTURES...")
@options.inputs_and_outputs(TENSORS, "safetensors")
@options.scaling_options
@click.option("--sample-mode", type=click.Choice([mode.value for mode in SampleMode]), default="sample", show_default=True,
              help="A sample of the encoder's distribution, its mode (argmax), or its unscaled moments.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the sample.  [default: random]")
@options.hint_option(ENCODE_PARAMETERS)
@options.connection()
def encode(
    arguments: tuple[str, ...], output: str | None, kind: str | None, key: str | None, force: bool, skip_existing: bool,
    concurrency: int, scaling: str | None, scaling_factor: float | None, shift_factor: float | None, sample_mode: str,
    seed: int | None, hints: Hints, as_json: bool, **server: Any,
) -> None:  # fmt: skip
    """Make latents of PICTURES: .png, .jpg and what else Pillow opens, folders of them, or -; a file each.

    `decode` makes pictures of them again. Tensors do as well: floats of -1 to 1, [B, 3, H, W] or video [B, 3, T, H, W], and
    uint8 [N, H, W, 3], which a model for videos takes as frames. Nothing is overwritten without --force.

    \b
    Example: remote-vae encode http://127.0.0.1:8000/demo picture.png -o latent.safetensors
    """
    mode = SampleMode(sample_mode)
    endpoint, sources = options.endpoint_and_files(arguments, (*files.PICTURE_SUFFIXES, *files.TENSOR_SUFFIXES))
    scaled = options.scaling(scaling, scaling_factor, shift_factor)
    if mode is SampleMode.MOMENTS:
        if scaling == "own" or (scaled != Scaling(own=True) and scaling is None):
            raise click.UsageError(
                "--sample-mode moments are not latents yet and cannot be scaled; leave out the scaling"
            )
        scaled = Scaling()
    outputs = _outputs(output, kind, TENSORS, sources, as_json)
    made = outputs.kind or TENSORS[0]
    transport = options.transport(endpoint, concurrency, **server)

    def work(source: Path) -> Made:
        (path,) = outputs.paths(source, made)
        if _is_done(source, [path], force, skip_existing):
            return []
        request = EncodeRequest(files.read_image(source, key), scaled, mode, seed, hints)
        with runs.waiting_line(len(sources)) as on_wait:
            (result,) = transport.send([request], on_wait)
        return [(path, _tensor_file(result.tensor, made))]

    with closing(transport):
        _run(Run(sources), work, concurrency, as_json)


@main.command(short_help="List the models of a server.")
@click.argument("arguments", nargs=-1, metavar="[SERVER]")
@options.connection()
def models(arguments: tuple[str, ...], as_json: bool, **server: Any) -> None:
    """List the models of SERVER: its URL, or that of any of its models. Starts none of them.

    \b
    Example: remote-vae models http://127.0.0.1:8000
    """
    url, others = options.endpoint_of(arguments, "")
    if others:
        raise click.UsageError(f"{others[0]!r} is one argument too many; it is `remote-vae models {url}`")
    try:
        listed = _models(url, server)
    except (UnknownRoute, UnknownModel):
        parts = urlsplit(url)
        trunk = parts.path.rstrip("/").rpartition("/")[0]
        if trunk == parts.path.rstrip("/"):
            raise
        listed = _models(urlunsplit(parts._replace(path=trunk)), server)
    if as_json:
        click.echo(json.dumps({"models": [model.to_plain() for model in listed]}))
        return
    told = [(model.name, model.state, model.class_name, model.reason) for model in listed]
    rows = [tuple(" ".join((cell or "-").split()) for cell in row) for row in told]
    rows.insert(0, ("NAME", "STATE", "CLASS", "REASON"))
    widths = [max(len(row[number]) for row in rows) for number in range(3)]
    for row in rows:
        click.echo("  ".join([*map(str.ljust, row, widths), row[-1]]))


@main.command(short_help="Measure how fast a model answers.")
@click.argument("arguments", nargs=-1, metavar="[ENDPOINT]")
@click.option("--shape", help="Of the latents, such as 1,4,64,64.  [default: one that the model takes]")
@click.option("--dtype", type=click.Choice(LATENT_DTYPES), default="float16", show_default=True, help="Of the latents.")
@click.option("--format", "kind", type=click.Choice(("jpg", "png", "mp4", "tensor")),
              help="Of the answers.  [default: jpg, mp4 of videos, tensor of batches]")  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1), default=50, show_default=True, help="How many are measured.")
@click.option("--concurrency", type=click.IntRange(1, 1024), default=4, show_default=True, help="How many at a time.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="How many are sent before.")
@options.size_options
@options.connection(retries=0)
def bench(
    arguments: tuple[str, ...], shape: str | None, dtype: str, kind: str | None, requests: int, concurrency: int,
    warmup: int, height: int | None, width: int | None, as_json: bool, **server: Any,
) -> None:  # fmt: skip
    """Measure how fast a model answers: latency as the client sees it, the server's stages, answers a second.

    A model that is not loaded loads before the measurement begins.

    \b
    Example: remote-vae bench http://127.0.0.1:8000/demo --shape 1,16,64,64 --requests 50 --concurrency 4
    """
    endpoint, others = options.endpoint_of(arguments)
    if others:
        raise click.UsageError(f"{others[0]!r} is one argument too many; shapes are given as --shape 1,4,64,64")
    with closing(options.transport(endpoint, concurrency, **server)) as transport:
        sizes = _shape(shape) if shape is not None else _shape_of(transport.describe(wake=True))
        latents = benchmark.noise(sizes, dtype)
        video, batch = len(sizes) == 5, len(sizes) == 4 and sizes[0] > 1
        made = kind or ("mp4" if video else "tensor" if batch else "jpg")
        of_reply = Output.PT if made == "tensor" else Output(made)
        request = DecodeRequest(latents, Scaling(own=True), of_reply, height, width)
        for _ in range(warmup):
            transport.send_one(request)
        with runs.progress(requests) as tick:
            report = benchmark.measure(lambda: transport.send_one(request), requests, concurrency, tick)
    about = {"endpoint": endpoint, "shape": list(sizes), "dtype": dtype, "format": made, "concurrency": concurrency}
    click.echo(json.dumps(about | report.as_fields()) if as_json else report.as_text())
    sys.exit(runs.exit_code(report.errors))


def _outputs(output: str | None, kind: str | None, kinds: Sequence[str], sources: list[Path], as_json: bool) -> Outputs:
    outputs = Outputs.of(output, kind, kinds, sources)
    if outputs.file == STDIO and as_json:
        raise click.UsageError("--json and the result do not both go to standard output; give -o a file or a folder")
    if outputs.file == STDIO and sys.stdout.isatty():
        raise click.UsageError("The result is no text for a terminal; give -o a file or a folder, or redirect")
    return outputs


def _is_done(source: Path, paths: list[Path], force: bool, skip_existing: bool) -> bool:
    """Whether the files are there and may stay. Raises FileError where they may neither stay nor go."""
    if source in paths and source != STDIO:
        raise FileError(f"{source} would overwrite itself; give -o another folder or name", "file_exists")
    if skip_existing:
        return all(path.exists() for path in paths)
    if not force:
        for path in paths:
            files.check_free(path)
    return False


def _run(run: Run, work: runs.Work, concurrency: int, as_json: bool) -> NoReturn:
    run.go(work, concurrency)
    if as_json:
        click.echo(json.dumps(run.as_fields()))
    else:
        run.tell()
    sys.exit(run.exit_code)


def _picture(pixels: Any, kind: str) -> bytes:
    """A frame, uint8 `[H, W, 3]`, as a file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG", "png": "PNG"}[kind], quality=95)
    return out.getvalue()


def _tensor_file(raw: RawTensor, kind: str) -> bytes:
    try:
        return tensor_files.render(raw, f".{kind}")
    except UnreadableTensor as error:
        raise FileError(f"A .{kind} {error}", "unwritable_file") from error


def _models(url: str, server: dict[str, Any]) -> list[ModelDescription]:
    with closing(options.transport(url, 1, **server)) as transport:
        return transport.describe_models()


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.strip("[]() ").replace("x", ",").split(","))
    except ValueError:
        raise click.UsageError(
            f"--shape is {text!r}; expected numbers with commas between, such as 1,4,64,64"
        ) from None
    if not 3 <= len(sizes) <= 5 or min(sizes) < 1:
        raise click.UsageError(f"--shape is {text!r}; latents have 3 to 5 axes, each at least 1")
    return sizes


def _shape_of(model: ModelDescription) -> tuple[int, ...]:
    """Latents of a picture of 512 pixels or so, or of a short video, that the model takes."""
    channels, ratio = model.latent_channels, model.spatial_ratio or 8
    if channels is None:
        raise BadRequest("The server does not say which latents this model takes; give --shape", parameter="shape")
    side = max(512 // ratio, 1)
    return (1, channels, 5, side // 2, side // 2) if model.video else (1, channels, side, side)


if __name__ == "__main__":
    main()
