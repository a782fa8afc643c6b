"""`remote-vae encode`: latents are those that the client would get."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from client_commands import command, here, png, server, succeed, z
from remote_vae import remote_encode
from samples import tiny_vae
from scripted_server import Exchange, ScriptedServer

__all__ = ["here", "server", "z"]  # fixtures


def test_hints_of_an_encode_are_sent_beside_its_seed(server: str, here: Path) -> None:
    Path("a.png").write_bytes(png())
    succeed("encode", f"{server}/flux", "a.png", "--seed", "3", "--hint", "sigma_data=0.5")
    theirs = remote_encode(f"{server}/flux", png(), do_scaling=True, seed=3)
    assert torch.equal(load_file("a.safetensors")["latents"], torch.as_tensor(theirs))


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
