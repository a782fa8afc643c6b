"""What fails of the user's command is said in a sentence, with the right exit code."""

from __future__ import annotations

import json
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from client_commands import command, failing, here, png, script, server, some_latents, z
from limits import WAIT_S
from remote_vae.errors import ModelStarting, Unauthorized
from samples import latents
from scripted_server import Exchange, ScriptedServer

__all__ = ["here", "server", "z"]  # fixtures


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
    given_up = threading.Event()
    with ScriptedServer(lambda exchange: given_up.wait(WAIT_S)) as slow:
        result = command("decode", slow.url, "latent.safetensors", "--timeout", "0.2", "--retries", "0")
        given_up.set()
    assert result.exit_code == 3
    assert "did not answer" in result.stderr


@pytest.mark.parametrize("option", ["--concurrency", "--jobs"])
def test_what_every_file_would_meet_is_met_once(here: Path, option: str) -> None:
    some_latents(here / "in", 20)
    with failing(Unauthorized("No token, or a wrong one")) as closed:
        result = command("decode", closed.url, "in", "-o", "out/", option, "2")
        assert len(closed.requests) <= 4
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "in/0.npy, in/1.npy, in/10.npy and 17 more: No token, or a wrong one",
        "20 of 20 inputs failed",
    ]


def test_the_token_is_sent_and_shown_to_nobody(z: torch.Tensor) -> None:
    with failing(Unauthorized("A wrong token")) as closed:
        for result in (
            command("decode", closed.url, "latent.safetensors", "--token", "s3cret"),
            command("models", closed.url, "--json", REMOTE_VAE_TOKEN="s3cret"),
        ):
            assert result.exit_code == 1
            assert "s3cret" not in result.output
        assert {headers.get("authorization") for headers in closed.headers} == {"Bearer s3cret"}


def test_ctrl_c_leaves_at_once_and_no_half_of_a_file(here: Path) -> None:
    some_latents(here / "in", 8)
    asked = threading.Semaphore(0)
    released = threading.Event()

    def hang(exchange: Exchange) -> None:
        asked.release()
        released.wait(WAIT_S)

    with ScriptedServer(hang) as hanging:
        # A shell that starts the tests in the background has them ignore Ctrl-C, and their children with them.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        run = script("decode", hanging.url, "in", "-o", "out/")
        signal.signal(signal.SIGINT, before)
        assert all(asked.acquire(timeout=WAIT_S) for _ in range(4))
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=WAIT_S / 2)  # with four requests that nobody has answered
        released.set()
    assert (run.returncode, said) == (-signal.SIGINT, "\nStopped.\n")
    assert not list(here.glob("out/*"))


def test_files_that_cannot_be_written_are_one_sentence(server: str, z: torch.Tensor) -> None:
    Path("file").write_text("")
    result = command("decode", f"{server}/sd", "latent.safetensors", "-o", "file/picture.png")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "file/picture.png cannot be written" in result.stderr
