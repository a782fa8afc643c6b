"""The user's command: what it writes is what the client would return, what fails is said in a sentence, with the right exit
code. Servers are real ones, on this machine; only what goes wrong on the way is scripted."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from in_process import InProcess, diffusers_engine, pipeline_of
from reading import read
from remote_vae import remote_decode, remote_encode
from remote_vae.cli import main
from remote_vae.errors import ModelStarting, Overloaded, Unauthorized, render
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.http.app import create_app
from samples import latents, pipeline_decode, postprocessed, save_tiny_vae, tiny_vae
from scripted_server import Exchange, ScriptedServer

SCRIPT = Path(sys.executable).with_name("remote-vae")


class Described(InProcess):
    """As an ingress describes its models."""

    def describe(self, name: str) -> ModelDescription:
        described = super().describe(name)
        if name == "tiny":
            return replace(described, state="failed", reason="no\nsuch folder")
        return replace(described, latent_channels=4, spatial_ratio=8, class_name="AutoencoderKL", video=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with tiny models."""
    folder = tmp_path_factory.mktemp("weights")
    pipelines = {
        kind: pipeline_of(diffusers_engine(save_tiny_vae(kind, folder / kind)), kind)
        for kind in ("sd", "flux", "hunyuan", "tiny")
    }
    app = create_app(Described(**{kind: p.answer for kind, p in pipelines.items()}), max_body=2**22, deadline_s=60)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join()
    for pipeline in pipelines.values():
        pipeline.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("REMOTE_VAE_TOKEN", "REMOTE_VAE_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def z(here: Path) -> torch.Tensor:
    """The latents in latent.safetensors."""
    made = latents(1, 4, 8, 12)
    save_file({"latents": made}, "latent.safetensors")
    return made


def command(*arguments: str | Path, stdin: bytes | None = None, **environment: str) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def succeed(*arguments: str | Path, **options: Any) -> Result:
    result = command(*arguments, **options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def script(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def failing(error: Exception) -> ScriptedServer:
    return ScriptedServer(lambda exchange: exchange.reply(*render(error)))  # type: ignore[arg-type]


def some_latents(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        np.save(folder / f"{number}.npy", latents(1, 4, 8, 8, seed=number).numpy())
    return folder


def png() -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pixels_of(path: str | io.BytesIO, image_format: str = "PNG") -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        assert image.format == image_format
        return np.asarray(image)


@pytest.mark.parametrize("name", ["", *sorted(main.commands)])
def test_every_command_has_help_with_an_example(name: str) -> None:
    shown = succeed(*filter(None, (name, "--help"))).output
    assert re.search(rf"Example: remote-vae {name or 'decode'}\b", shown)


def test_the_exit_codes_are_documented() -> None:
    assert all(re.search(rf"^ +(Exit codes: )?{code}  ", succeed("--help").output, re.M) for code in (0, 1, 2, 3, 130))


def test_the_version_is_that_of_the_package() -> None:
    assert succeed("--version").output == f"remote-vae {version('remote-vae')}\n"


def test_the_installed_script_writes_what_diffusers_decodes(server: str, z: torch.Tensor) -> None:
    run = script("decode", f"{server}/sd", "latent.safetensors", "-o", "picture.png")
    assert run.communicate(timeout=60) == ("picture.png\n", "")
    expected = postprocessed(pipeline_decode(tiny_vae("sd"), z), "pil")[0]
    assert np.array_equal(pixels_of("picture.png"), np.asarray(expected))


def test_each_suffix_is_what_the_client_returns(server: str, z: torch.Tensor) -> None:
    url = f"{server}/sd"
    for name in ("a.png", "a.jpg", "b.jpeg", "a.npy", "a.safetensors", "a.pt"):
        assert succeed("decode", url, "latent.safetensors", "-o", name).output == f"{name}\n"
    exact = remote_decode(url, z, output_type="pt")
    assert np.array_equal(np.load("a.npy"), exact.numpy())
    assert torch.equal(load_file("a.safetensors")["latents"], exact)
    assert torch.equal(torch.load("a.pt", weights_only=True), exact)
    for name, image_format in (("a.png", "png"), ("a.jpg", "jpg"), ("b.jpeg", "jpg")):
        expected = remote_decode(url, z, image_format=image_format)
        written = pixels_of(name, {"png": "PNG", "jpg": "JPEG"}[image_format])
        assert np.array_equal(written, np.asarray(expected)), "not the server's own bytes"


def test_the_inputs_of_a_folder_are_told_apart_by_their_suffix_and_read_by_their_bytes(server: str, here: Path) -> None:
    z = latents(1, 4, 8, 8)
    np.save("a.npy", z.double().numpy())
    torch.save(z, "b.pth")
    save_file({"latent_tensor": z, "latent_format_version_0": torch.empty(0)}, "c.latent")
    os.rename("a.npy", "a.pt")
    Path("notes.txt").write_text("not meant")
    result = succeed("decode", f"{server}/sd", ".", "-o", "out/", "--format", "npy")
    assert result.output.split() == [f"out/{name}.npy" for name in "abc"]
    exact = remote_decode(f"{server}/sd", z, output_type="pt").numpy()
    assert all(np.array_equal(np.load(f"out/{name}.npy"), exact) for name in "abc")


def test_without_torch_bfloat16_is_sent_as_it_is_and_a_pt_says_what_it_needs(server: str, here: Path) -> None:
    z = latents(1, 4, 8, 8).bfloat16()
    save_file({"z": z}, "brain.safetensors")
    torch.save(z, "needs.pt")
    code = f"""
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None
from remote_vae.cli import main
main(["decode", "{server}/sd", "brain.safetensors", "needs.pt", "-o", "out/", "--format", "npy"])
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout) == (1, "out/brain.npy\n")
    assert run.stderr.startswith("needs.pt needs torch to be read (pip install torch)")
    exact = remote_decode(f"{server}/sd", z, output_type="pt").float().numpy()
    assert np.array_equal(np.load("out/brain.npy"), exact)


def test_a_batch_becomes_numbered_files_and_one_tensor(server: str, here: Path) -> None:
    url, z = f"{server}/sd", latents(11, 4, 4, 4)
    np.save("z.npy", z.numpy())
    names = succeed("decode", url, "z.npy", "-o", "picture.png").output.split()
    assert names == [f"picture-{number:02}.png" for number in range(11)]
    images = remote_decode(url, z, image_format="png")
    assert all(np.array_equal(pixels_of(name), image) for name, image in zip(names, images, strict=True))
    assert succeed("decode", url, "z.npy", "-o", "all.safetensors").output == "all.safetensors\n"
    assert load_file("all.safetensors")["latents"].shape == (11, 3, 32, 32)


def test_a_video_becomes_an_mp4_or_its_frames(server: str, here: Path) -> None:
    url, z = f"{server}/hunyuan", latents(1, 4, 3, 4, 6)
    save_file({"z": z}, "video.safetensors")
    assert succeed("decode", url, "video.safetensors", "--fps", "5").output == "video.mp4\n"
    assert read(Path("video.mp4").read_bytes(), here).fps == 5
    names = succeed("decode", url, "video.safetensors", "-o", "frames/", "--format", "png").output.split()
    exact = remote_decode(url, z, output_type="pt", partial_postprocess=True, return_type="pt").numpy()
    assert len(names) == len(exact) == 9
    assert all(np.array_equal(pixels_of(name), frame) for name, frame in zip(names, exact, strict=True))
    assert command("decode", url, "video.safetensors", "-o", "frames/", "--format", "png").exit_code == 1


def test_hints_are_sent_and_a_packed_video_of_several_frames_is_one(here: Path) -> None:
    np.save("z.npy", latents(1, 24, 16).numpy())
    sent = []

    def answer(exchange: Exchange) -> None:
        sent.append(exchange.decode_request())
        exchange.reply(200, {"content-type": "video/mp4"}, b"frames")

    words = ("--hint", "num_frames=9", "--hint", "decode_timestep=0.05", "--hint", "denormalised=TRUE")
    with ScriptedServer(answer) as scripted:
        assert succeed("decode", scripted.url, "z.npy", "--height", "64", "--width", "96", *words).output == "z.mp4\n"
    (request,) = sent
    assert request.hints == Hints(num_frames=9, decode_timestep=0.05, denormalised=True)
    assert Path("z.mp4").read_bytes() == b"frames"


def test_hints_of_an_encode_are_sent_beside_its_seed(server: str, here: Path) -> None:
    Path("a.png").write_bytes(png())
    succeed("encode", f"{server}/flux", "a.png", "--seed", "3", "--hint", "sigma_data=0.5")
    theirs = remote_encode(f"{server}/flux", png(), do_scaling=True, seed=3)
    assert torch.equal(load_file("a.safetensors")["latents"], torch.as_tensor(theirs))


def test_a_hint_that_is_none_is_a_wrong_command(here: Path) -> None:
    np.save("z.npy", latents(1, 4, 2, 2).numpy())
    for command_, hint, says in (
        ("decode", "nmu_frames=3", "NAME one of num_frames, layers"), ("decode", "num_frames", "expected NAME=VALUE"),
        ("decode", "num_frames=", "expected NAME=VALUE"), ("decode", "num_frames=0", "num_frames is 0; expected a whole number"),
        ("decode", "seed=x", "seed is 'x'"), ("encode", "seed=3", "NAME one of num_frames"),
    ):  # fmt: skip
        failed = command(command_, "http://127.0.0.1:1/sd", "z.npy", "--hint", hint)
        assert failed.exit_code == 2
        assert says in failed.stderr


def test_packed_latents_are_told_their_size(server: str, here: Path) -> None:
    z = latents(2, 24, 64)
    np.save("packed.npy", z.numpy())
    sizes = ("--height", "64", "--width", "96")
    names = succeed("decode", f"{server}/flux", "packed.npy", *sizes).output.split()
    expected = remote_decode(f"{server}/flux", z, height=64, width=96, image_format="png")
    assert names == ["packed-0.png", "packed-1.png"]
    assert all(np.array_equal(pixels_of(name), image) for name, image in zip(names, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("--scaling", "own"), {"do_scaling": True}),
        (("--scaling", "none"), {"do_scaling": False}),
        (("--scaling-factor", "0.5", "--shift-factor", "0.1"), {"scaling_factor": 0.5, "shift_factor": 0.1}),
    ],
)
def test_scaling_is_that_of_the_client(
    server: str, z: torch.Tensor, arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    succeed("decode", f"{server}/sd", "latent.safetensors", "-o", "a.npy", *arguments)
    expected = remote_decode(f"{server}/sd", z, output_type="pt", **options)
    assert np.array_equal(np.load("a.npy"), expected.numpy())


def test_one_tensor_of_several_is_chosen_by_its_name(server: str, here: Path) -> None:
    save_file({"first": latents(1, 4, 4, 4), "second": latents(1, 4, 8, 8)}, "both.safetensors")
    unsaid = command("decode", f"{server}/sd", "both.safetensors", "-o", "x.png")
    assert (unsaid.exit_code, "--key" in unsaid.stderr) == (1, True)
    succeed("decode", f"{server}/sd", "both.safetensors", "-o", "x.png", "--key", "second")
    assert pixels_of("x.png").shape == (64, 64, 3)


def test_a_failing_file_stops_no_other_and_is_listed_at_the_end(server: str, here: Path) -> None:
    some_latents(here / "in", 5)
    np.save("in/2.npy", np.zeros((1, 5, 8, 8), np.float32))
    (here / "in" / "3.npy").write_bytes(b"no latents")
    result = command("decode", f"{server}/sd", "in", "-o", "out")
    assert result.exit_code == 1
    assert result.stdout.split() == ["out/0.png", "out/1.png", "out/4.png"]
    of_the_server, of_the_file, total = result.stderr.splitlines()
    assert of_the_server.startswith("in/2.npy: Latents of shape [1, 5, 8, 8] do not fit")
    assert of_the_file == "in/3.npy is neither safetensors nor .npy nor .pt"
    assert total == "2 of 5 inputs failed"
    fields = json.loads(command("decode", f"{server}/sd", "in", "-o", "other/", "--json").stdout)
    assert (fields["error"], fields["code"], fields["failed"]) == (total, "several", 2)
    assert [entry.get("code") for entry in fields["files"]] == [None, None, "bad_request", "unreadable_file", None]
    assert fields["files"][0] == {"input": "in/0.npy", "outputs": ["other/0.png"]}
    assert fields["files"][2]["request_id"]


def test_a_file_that_is_no_latent_is_one_sentence_with_its_name(server: str, here: Path) -> None:
    for name, data in (("text.pt", b"text"), ("empty.npy", b""), ("cut.npy", b"\x93NUMPY\x01")):
        (here / name).write_bytes(data)
        result = command("decode", f"{server}/sd", name, "-o", "x.png")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.stderr
        assert result.stderr.startswith(f"{name} ")
    assert not (here / "x.png").exists()


def test_nothing_is_overwritten_unless_asked_for(server: str, z: torch.Tensor) -> None:
    picture = Path("picture.png")
    picture.write_text("mine")
    refused = command("decode", f"{server}/sd", "latent.safetensors", "-o", "picture.png")
    assert (refused.exit_code, picture.read_text()) == (1, "mine")
    assert "--force" in refused.stderr
    assert succeed("decode", f"{server}/sd", "latent.safetensors", "-o", "picture.png", "--skip-existing").output == ""
    assert picture.read_text() == "mine"
    succeed("decode", f"{server}/sd", "latent.safetensors", "-o", "picture.png", "--force")
    assert pixels_of("picture.png").shape == (64, 96, 3)


def test_an_input_is_never_overwritten(server: str, z: torch.Tensor) -> None:
    before = Path("latent.safetensors").read_bytes()
    for option in ("--force", "--skip-existing"):
        result = command("decode", f"{server}/sd", "latent.safetensors", "--format", "safetensors", option)
        assert (result.exit_code, Path("latent.safetensors").read_bytes()) == (1, before)


def test_a_run_that_stopped_goes_on_where_it_was(server: str, here: Path) -> None:
    some_latents(here / "in", 4)
    arguments = ("decode", f"{server}/sd", "in", "-o", "out/")
    succeed(*arguments)
    (here / "out" / "2.png").unlink()
    assert command(*arguments).stderr.startswith("in/0.npy, in/1.npy, in/3.npy: The files exist: --force overwrites")
    (here / "out" / "2.png").unlink()
    assert succeed(*arguments, "--skip-existing").output == "out/2.png\n"


def test_pipes_are_read_and_written(server: str, z: torch.Tensor) -> None:
    sent = Path("latent.safetensors").read_bytes()
    result = command("decode", f"{server}/sd", "-", stdin=sent)
    expected = remote_decode(f"{server}/sd", z, image_format="png")
    assert np.array_equal(pixels_of(io.BytesIO(result.stdout_bytes)), expected)
    encoded = command("encode", f"{server}/sd", "-", "--format", "npy", "--seed", "1", stdin=png())
    assert np.load(io.BytesIO(encoded.stdout_bytes)).shape == (1, 4, 8, 12)
    named = succeed("decode", f"{server}/sd", "-", "-o", "out/", "--format", "jpg", stdin=sent)
    assert named.output == "out/stdin.jpg\n"


WRONG = {
    "no endpoint": ("decode", "latent.safetensors"),
    "no input": ("decode", "URL"),
    "no such file": ("decode", "URL", "nope.npy"),
    "an empty folder": ("decode", "URL", "empty"),
    "several into one file": ("decode", "URL", "latent.safetensors", "other.safetensors", "-o", "a.png"),
    "several into standard output": ("decode", "URL", "latent.safetensors", "other.safetensors", "-o", "-"),
    "a batch into standard output": ("decode", "URL", "batch.npy", "-o", "-"),
    "two of one name": ("decode", "URL", "latent.safetensors", "twin/latent.safetensors", "-o", "out/"),
    "an unknown suffix": ("decode", "URL", "latent.safetensors", "-o", "a.gif"),
    "a picture of latents": ("encode", "URL", "picture.png", "-o", "a.png"),
    "a format that the name denies": ("decode", "URL", "latent.safetensors", "-o", "a.png", "--format", "jpg"),
    "both scalings": ("decode", "URL", "latent.safetensors", "--scaling", "own", "--scaling-factor", "2"),
    "a factor of zero": ("decode", "URL", "latent.safetensors", "--scaling-factor", "0"),
    "moments that are scaled": ("encode", "URL", "picture.png", "--sample-mode", "moments", "--scaling", "own"),
    "an unknown option": ("decode", "URL", "latent.safetensors", "--heigth", "3"),
    "a timeout of zero": ("models", "URL", "--timeout", "0"),
    "an address without its scheme": ("decode", "127.0.0.1:8000/demo", "latent.safetensors"),
    "a shape that is none": ("bench", "URL", "--shape", "1,4,x,8"),
    "a shape of two axes": ("bench", "URL", "--shape", "4,8"),
    "an argument too many": ("bench", "URL", "latent.safetensors"),
    "an unknown command": ("recode", "URL"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(
    server: str, z: torch.Tensor, here: Path, mistake: str
) -> None:
    (here / "empty").mkdir()
    (here / "twin").mkdir()
    for name in ("other.safetensors", "twin/latent.safetensors"):
        save_file({"z": z}, name)
    np.save("batch.npy", latents(2, 4, 4, 4).numpy())
    Path("picture.png").write_bytes(png())
    arguments = [f"{server}/sd" if argument == "URL" else argument for argument in WRONG[mistake]]
    files = sorted(here.rglob("*"))
    result = command(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    as_json = command(*arguments, "--json")
    assert (as_json.exit_code, as_json.stderr) == (2, "")
    assert json.loads(as_json.stdout)["code"] == "usage"
    assert sorted(here.rglob("*")) == files


def test_json_and_a_picture_do_not_share_standard_output(server: str, z: torch.Tensor) -> None:
    result = command("decode", f"{server}/sd", "latent.safetensors", "-o", "-", "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "usage")


def test_the_endpoint_may_stand_in_the_environment(server: str, z: torch.Tensor) -> None:
    assert succeed("decode", "latent.safetensors", REMOTE_VAE_ENDPOINT=f"{server}/sd").output == "latent.png\n"
    assert "hunyuan" in succeed("models", REMOTE_VAE_ENDPOINT=f"{server}/sd").output


def test_what_encode_wrote_decode_makes_a_picture_of_again(server: str, here: Path) -> None:
    url, picture = f"{server}/sd", png()
    Path("picture.png").write_bytes(picture)
    assert succeed("encode", url, "picture.png", "-o", "z.safetensors", "--seed", "7").output == "z.safetensors\n"
    z = load_file("z.safetensors")["latents"]
    assert torch.equal(z, remote_encode(url, picture, do_scaling=True, seed=7))
    succeed("decode", url, "z.safetensors", "-o", "again.npy")
    exact = tiny_vae("sd").decode(z / 0.18215, return_dict=False)[0]
    assert np.array_equal(np.load("again.npy"), exact.numpy())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--seed", "3"), {"do_scaling": True, "seed": 3}),
        (("--seed", "3", "--scaling", "none"), {"seed": 3}),
        (("--sample-mode", "argmax"), {"do_scaling": True, "sample_mode": "argmax"}),
        (("--sample-mode", "argmax", "--scaling-factor", "2"), {"scaling_factor": 2.0, "sample_mode": "argmax"}),
        (("--sample-mode", "moments"), {"sample_mode": "moments"}),
    ],
)
def test_encode_is_that_of_the_client(
    server: str, here: Path, arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    Path("picture.png").write_bytes(png())
    succeed("encode", f"{server}/sd", "picture.png", "-o", "z.npy", *arguments)
    assert np.array_equal(np.load("z.npy"), remote_encode(f"{server}/sd", png(), **options).numpy())


def test_every_kind_of_picture_is_encoded(server: str, here: Path) -> None:
    image = Image.open(io.BytesIO(png()))
    (here / "in").mkdir()
    image.save("in/a.bmp")
    image.save("in/b.webp", lossless=True)
    image.save("in/c.tiff")
    np.save("in/d.npy", np.asarray(image)[None])
    np.save("in/e.npy", (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None])
    (here / "in" / "f.png").write_bytes(png()[:500])
    result = command("encode", f"{server}/sd", "in", "-o", "out/", "--format", "npy", "--sample-mode", "argmax")
    assert result.stdout.split() == [f"out/{stem}.npy" for stem in "abcde"]
    assert (result.exit_code, "in/f.png" in result.stderr) == (1, True)
    expected = remote_encode(f"{server}/sd", image, do_scaling=True, sample_mode="argmax").numpy()
    for stem in "abcde":
        np.testing.assert_allclose(np.load(f"out/{stem}.npy"), expected, atol=1e-5)


def test_a_png_is_sent_as_it_is(here: Path) -> None:
    sent: list[Any] = []

    def answer(exchange: Exchange) -> None:
        sent.append(exchange.said)
        exchange.reply(400, {}, b'{"error": "no", "code": "bad_request"}')

    Path("picture.png").write_bytes(png())
    with ScriptedServer(answer) as broken:
        assert command("encode", broken.url, "picture.png").exit_code == 1
        assert broken.requests[0].startswith("POST /model/encode?")
    assert sent == [png()]


def test_a_picture_is_no_latent_and_the_way_out_is_said(server: str, here: Path) -> None:
    Path("picture.npy").write_bytes(png())
    result = command("decode", f"{server}/sd", "picture.npy")
    assert result.exit_code == 1
    assert "remote-vae encode" in result.stderr


@pytest.mark.parametrize("below", ["", "/", "/sd"])
def test_models_are_listed_as_a_table_or_as_json(server: str, here: Path, below: str) -> None:
    rows = succeed("models", server + below).output.splitlines()
    assert rows[0].split() == ["NAME", "STATE", "CLASS", "REASON"]
    assert {tuple(row.split(maxsplit=3)) for row in rows[1:]} >= {
        ("sd", "ready", "AutoencoderKL", "-"),
        ("tiny", "failed", "-", "no such folder"),
    }
    listed = json.loads(succeed("models", server + below, "--json").output)["models"]
    assert [model["name"] for model in listed] == ["flux", "hunyuan", "sd", "tiny"]


def test_what_is_no_server_of_ours_is_said_to_be_none(here: Path) -> None:
    with ScriptedServer(lambda exchange: exchange.reply(200, {}, b'{"models": "many"}')) as stranger:
        result = command("models", stranger.url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "remote-vae server?" in result.stderr


def test_bench_measures_what_the_client_and_the_server_say(server: str, here: Path) -> None:
    arguments = ("bench", f"{server}/sd", "--shape", "1,4,8,8", "--requests", "8", "--concurrency", "3")
    fields = json.loads(succeed(*arguments, "--json").output)
    assert (fields["requests"], fields["errors"], fields["concurrency"]) == (8, {}, 3)
    latency = fields["latency_ms"]
    assert 0 < latency["least"] <= latency["median"] <= latency["p90"] <= latency["p99"] <= latency["most"]
    assert list(fields["server_ms"]) == ["queue", "decode", "encode"]
    assert fields["server_ms"]["decode"]["least"] < latency["most"]
    assert fields["per_second"] == pytest.approx(8 / fields["seconds"], rel=0.02)
    text = succeed(*arguments, "--dtype", "bfloat16", "--format", "tensor").output
    assert "8 requests in" in text
    assert re.search(r"^latency( +[\d.]+){5}$", text, re.M)


def test_bench_finds_latents_that_the_model_takes(server: str, here: Path) -> None:
    fields = json.loads(succeed("bench", f"{server}/sd", "--requests", "1", "--json").output)
    assert (fields["shape"], fields["format"]) == ([1, 4, 64, 64], "jpg")


def test_bench_counts_errors_and_gives_up_where_the_first_request_fails(server: str, here: Path) -> None:
    first = command("bench", f"{server}/sd", "--shape", "1,5,8,8")
    assert (first.exit_code, first.stdout, first.stderr.count("\n")) == (1, "", 1)

    with failing(Overloaded("The queue is full", retry_after=1)) as busy:
        arguments = ("bench", busy.url, "--shape", "1,4,8,8", "--warmup", "0", "--requests", "6")
        result = command(*arguments)
        assert result.exit_code == 3
        assert "6 failed with overloaded: The queue is full" in result.stdout
        assert json.loads(command(*arguments, "--json").stdout)["errors"] == {"overloaded": 6}
        assert len(busy.requests) == 12, "a request that is tried again hides an error"


@pytest.mark.parametrize("name", ["decode", "models", "bench"])
def test_a_server_that_is_away_is_one_sentence_and_exit_code_3(z: torch.Tensor, name: str) -> None:
    arguments = {"decode": ("latent.safetensors",), "bench": ("--shape", "1,4,8,8"), "models": ()}[name]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/sd"
    result = command(name, url, *arguments, "--retries", "0")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (3, "", 1)
    assert f"{url} cannot be reached" in result.stderr
    as_json = command(name, url, *arguments, "--retries", "0", "--json")
    assert (as_json.exit_code, as_json.stderr) == (3, "")
    assert json.loads(as_json.stdout)["code"] == "connection_failed"


def test_a_server_that_is_busy_is_tried_again_as_often_as_was_said(z: torch.Tensor) -> None:
    with failing(ModelStarting("It is being loaded", retry_after=1)) as busy:
        result = command("decode", busy.url, "latent.safetensors", "--retries", "1")
        assert (result.exit_code, len(busy.requests)) == (3, 2)
        command("decode", busy.url, "latent.safetensors", "--deadline", "0.5")
        assert len(busy.requests) == 3
    assert "It is being loaded" in result.stderr


def test_a_server_that_is_slow_is_given_up(z: torch.Tensor) -> None:
    with ScriptedServer(lambda exchange: time.sleep(2)) as slow:
        began = time.monotonic()
        result = command("decode", slow.url, "latent.safetensors", "--timeout", "0.2", "--retries", "0")
        assert time.monotonic() - began < 1.5
    assert result.exit_code == 3
    assert "did not answer" in result.stderr


def test_what_every_file_would_meet_is_met_once(here: Path) -> None:
    some_latents(here / "in", 20)
    with failing(Unauthorized("No token, or a wrong one")) as closed:
        result = command("decode", closed.url, "in", "-o", "out/", "--jobs", "2")
        assert len(closed.requests) <= 4
    assert result.exit_code == 1
    first, total = result.stderr.splitlines()
    assert first == "in/0.npy, in/1.npy, in/10.npy and 17 more: No token, or a wrong one"
    assert total == "20 of 20 inputs failed"


def test_the_token_is_sent_and_shown_to_nobody(z: torch.Tensor) -> None:
    with failing(Unauthorized("A wrong token")) as closed:
        for result in (
            command("decode", closed.url, "latent.safetensors", "--token", "s3cret"),
            command("models", closed.url, "--json", REMOTE_VAE_TOKEN="s3cret"),
        ):
            assert result.exit_code == 1
            assert "s3cret" not in result.output
        assert {headers.get("authorization") for headers in closed.headers} == {"Bearer s3cret"}


def test_a_pipe_sees_no_progress_bar_and_a_person_does(server: str, here: Path) -> None:
    pty = pytest.importorskip("pty")
    some_latents(here / "in", 12)
    piped = script("decode", f"{server}/sd", "in", "-o", "out/")
    assert piped.communicate(timeout=60)[1] == ""
    terminal, theirs = pty.openpty()
    arguments = [str(SCRIPT), "decode", f"{server}/sd", "in", "-o", "seen/"]
    with subprocess.Popen(arguments, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        while b"files written" not in shown:
            shown += os.read(terminal, 2**16)
        assert run.wait(timeout=60) == 0
    os.close(terminal)
    assert b"12/12" in shown
    assert b"12 files written, seen/0.png to seen/9.png" in shown


def test_ctrl_c_leaves_at_once_and_no_half_of_a_file(here: Path) -> None:
    some_latents(here / "in", 8)
    asked = threading.Semaphore(0)
    released = threading.Event()

    def hang(exchange: Exchange) -> None:
        asked.release()
        released.wait(30)

    with ScriptedServer(hang) as hanging:
        # A shell that starts the tests in the background has them ignore Ctrl-C, and their children with them.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        run = script("decode", hanging.url, "in", "-o", "out/")
        signal.signal(signal.SIGINT, before)
        assert all(asked.acquire(timeout=30) for _ in range(4))
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=20)
        took = time.monotonic() - began
        released.set()
    assert (run.returncode, said) == (-signal.SIGINT, "\nStopped.\n")
    assert took < 3
    assert not list(here.glob("out/*"))


def test_files_that_cannot_be_written_are_one_sentence(server: str, z: torch.Tensor) -> None:
    Path("file").write_text("")
    result = command("decode", f"{server}/sd", "latent.safetensors", "-o", "file/picture.png")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "file/picture.png cannot be written" in result.stderr
