"""The user's command: what it writes is what the client would return, what fails is said in a sentence, with the right exit
code. Servers are real ones, on this machine; only what goes wrong on the way is scripted."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from client_commands import SCRIPT, command, here, pixels_of, png, script, server, some_latents, succeed, z
from limits import WAIT_S
from reading import read
from remote_vae import remote_decode
from remote_vae.cli import main
from remote_vae.protocol.hints import Hints
from samples import latents, pipeline_decode, postprocessed, tiny_vae
from scripted_server import Exchange, ScriptedServer

__all__ = ["here", "server", "z"]  # fixtures


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
    assert run.communicate(timeout=WAIT_S) == ("picture.png\n", "")
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
import time
sys.modules["torch"] = None
from remote_vae.cli import main
main(["decode", "{server}/sd", "brain.safetensors", "needs.pt", "-o", "out/", "--format", "npy"])
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=False
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

    words = ("--hint", "num_frames=9", "--hint", "decode_timestep=0.05", "--force", "--hint")
    with ScriptedServer(answer) as scripted:
        for spelling in ("denormalized=TRUE", "denormalised=TRUE"):
            done = succeed("decode", scripted.url, "z.npy", "--height", "64", "--width", "96", *words, spelling)
            assert done.output == "z.mp4\n"
    assert [request.hints for request in sent] == [Hints(num_frames=9, decode_timestep=0.05, denormalized=True)] * 2
    assert Path("z.mp4").read_bytes() == b"frames"


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


def test_the_endpoint_may_stand_in_the_environment(server: str, z: torch.Tensor) -> None:
    assert succeed("decode", "latent.safetensors", REMOTE_VAE_ENDPOINT=f"{server}/sd").output == "latent.png\n"
    assert "hunyuan" in succeed("models", REMOTE_VAE_ENDPOINT=f"{server}/sd").output


def test_a_pipe_sees_no_progress_bar_and_a_person_does(server: str, here: Path) -> None:
    pty = pytest.importorskip("pty")
    some_latents(here / "in", 12)
    piped = script("decode", f"{server}/sd", "in", "-o", "out/")
    assert piped.communicate(timeout=WAIT_S)[1] == ""
    shown = shown_to_a_person(pty.openpty(), b"files written", "decode", f"{server}/sd", "in", "-o", "seen/")
    assert b"12/12" in shown
    assert b"12 files written, seen/0.png to seen/9.png" in shown


def shown_to_a_person(terminal: tuple[int, int], until: bytes, *arguments: str) -> bytes:
    """What a terminal shows of a command that ends well."""
    ours, theirs = terminal
    with subprocess.Popen([str(SCRIPT), *arguments], stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        while until not in shown:
            shown += os.read(ours, 2**16)
        assert run.wait(timeout=WAIT_S) == 0
    os.close(ours)
    return shown


def test_a_person_sees_what_the_one_input_waits_for(z: torch.Tensor) -> None:
    pty = pytest.importorskip("pty")
    starting = {"name": "m", "state": "starting", "reason": "waits for\x1b[2J 1 GPU"}

    def answer(exchange: Exchange) -> None:
        if exchange.command == "GET":
            exchange.reply(200, {}, json.dumps(starting).encode())
            return
        time.sleep(3)
        exchange.reply(200, {"content-type": "image/png"}, b"\x89PNG")

    with ScriptedServer(answer) as server:
        shown = shown_to_a_person(pty.openpty(), b"latent.png", "decode", server.url, "latent.safetensors")
        # A pipe is told nothing, and asks nothing.
        asked = len(server.requests)
        assert script("decode", server.url, "latent.safetensors", "--force").communicate(timeout=WAIT_S)[1] == ""
        assert len(server.requests) == asked + 1
    assert b"\r\x1b[Kstarting, 2 s: waits for [2J 1 GPU" in shown
    assert shown.endswith(b"\r\x1b[Klatent.png\r\n")
