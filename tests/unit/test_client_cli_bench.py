"""`remote-vae bench` and `remote-vae models`: what they measure and list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from client_commands import command, failing, here, server, succeed
from remote_vae.errors import Overloaded
from scripted_server import ScriptedServer

__all__ = ["here", "server"]  # fixtures


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
