"""Codecs and decodes that fail: a 500 for their own request that shows nothing of the inside, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from house import WAIT_S, children, filled, gated, house, open_files, post, send, temporary, until
from in_process import diffusers_engine
from raw_http import Answer, speak
from remote_vae.protocol.output import Output
from remote_vae_serve.codecs import codecs, mp4
from remote_vae_serve.engine.base import Decoded
from remote_vae_serve.engine.tiling import TilingPlan
from remote_vae_serve.families.layouts import RequestHints
from remote_vae_serve.replica.device_job import Job
from remote_vae_serve.replica.device_worker import DeviceWorker
from samples import latents, save_tiny_vae

__all__ = ["temporary"]  # a fixture


def assert_internal_error(answer: Answer) -> None:
    assert (answer.status, answer.content_type) == (500, "application/json")
    assert answer.fields is not None
    assert answer.fields["code"] == "internal_error"
    for inside in (b"secret", b"Error(", b"Traceback", b"ffmpeg", b"/"):
        assert inside not in answer.body


@pytest.mark.parametrize("output", [Output.JPEG, Output.PNG])
@pytest.mark.parametrize(
    "error", [RuntimeError("/root/secret"), MemoryError("secret"), SystemError("secret")], ids=repr
)
def test_a_picture_that_cannot_be_written_costs_nothing_to_its_neighbours_in_the_batch(
    temporary: Path, output: Output, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "to_jpeg" if output is Output.JPEG else "to_png"
    write = getattr(codecs, name)

    def failing(pixels: Any) -> bytes:
        if pixels.min() == 255:
            raise error
        return bytes(write(pixels))

    monkeypatch.setattr(codecs, name, failing)
    engine = gated(grouped=8)
    with house(engine, temporary) as there:
        engine.shut()
        first = send(there, post(filled(0), output, path=there.path))
        assert engine.entered.wait(WAIT_S)
        together = []
        for number, value in enumerate((-1, 1, 0)):
            together.append(send(there, post(filled(value), output, path=there.path)))
            until(lambda expected=number + 1: there.waiting == expected)  # type: ignore[misc]
        engine.open.set()
        left, failed, right = map(speak, together)
        assert [answer.status for answer in (speak(first), left, right)] == [200, 200, 200]
        assert_internal_error(failed)
        error.__traceback__ = None  # it is raised again and again, and would keep what it passed
        there.assert_tidy()
    assert engine.decoded == [[0.0], [-1.0, 1.0, 0.0], [0.0]]


def test_a_decode_that_fails_leaves_nothing_behind_and_is_in_the_log(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = gated()
    decode = engine.decode

    def failing(z: torch.Tensor, plan: TilingPlan, hints: RequestHints) -> Decoded:
        if z.min() == 1:
            raise RuntimeError("/root/secret")
        return decode(z, plan, hints)

    engine.decode = failing  # type: ignore[method-assign]
    with house(engine, temporary) as there:
        for _ in range(3):
            assert_internal_error(there.serve(filled(1)))
        assert "in failing" in caplog.text  # where it was raised
        caplog.clear()  # it holds the errors
        there.assert_tidy()


DYING = {
    "at once": "exit 7",
    "in the middle": "head -c 20000 > /dev/null\necho secret >&2\nexit 7",
    "by a signal": "head -c 20000 > /dev/null\nkill -9 $$",
    "after all of it": "cat > /dev/null\nexit 1",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae("hunyuan", tmp_path_factory.mktemp("hunyuan"))


@pytest.mark.parametrize("dying", [*DYING, "before it starts"])
def test_an_mp4_encoder_that_dies_is_a_500_and_no_process_or_memory_is_left(
    temporary: Path, tmp_path: Path, videos: Path, dying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    if dying in DYING:
        ffmpeg.write_text(f"#!/bin/sh\n{DYING[dying]}\n")
        ffmpeg.chmod(0o755)
    z = latents(1, 4, 3, 8, 8)  # 108 KiB of frames: more than a pipe holds
    with house(diffusers_engine(videos), temporary, first=(z, Output.MP4)) as there:
        with monkeypatch.context() as patched:
            patched.setattr(mp4.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
            assert_internal_error(there.serve(z, Output.MP4))
        there.assert_tidy()


def test_frames_that_do_not_come_leave_no_encoder_waiting_for_them() -> None:
    def frames() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        raise RuntimeError("the device was lost")

    others = set(children())
    with pytest.raises(RuntimeError, match="the device was lost"):
        mp4.to_mp4(frames(), (2, 64, 64, 3), 8)
    assert not set(children()) - others
    assert not [name for name in open_files() if "memfd:" in name]


def test_an_encoder_that_complains_without_end_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words and our frames each go through a pipe of 64 KiB: both sides could wait for the other for ever."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\nhead -c 2000000 /dev/zero >&2\ncat > /dev/null\nexit 3\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setattr(mp4.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
    ended = threading.Event()
    others = set(children())

    def run() -> None:
        with pytest.raises(mp4.InternalError):
            mp4.to_mp4([torch.zeros(8, 256, 256, 3, dtype=torch.uint8)], (8, 256, 256, 3), 8)
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    if not ended.wait(WAIT_S):
        for child in set(children()) - others:
            os.kill(int(child), signal.SIGKILL)
    assert ended.is_set()


def test_a_batch_that_failed_has_let_go_of_its_tensors_before_its_members_run_alone() -> None:
    """It may have been out of memory: what its frames hold would still be there."""
    made: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []
    begun = threading.Event()

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert begun.wait(WAIT_S)
        left.append(sum(one() is not None for one in made))
        if len(batch) > 1:
            large = batch * 2
            made.append(weakref.ref(large))
            raise MemoryError
        return batch, None

    device = DeviceWorker(nullcontext)
    jobs = [
        Job(torch.zeros(1), run, lambda part: part, batch_key=group, batch_limit=8) for group in ("alone", "a", "a")
    ]
    for job in jobs:
        device.submit(job)
    begun.set()
    for job in jobs:
        job.done.result(WAIT_S)
    device.close()
    assert (len(made), left) == (1, [0, 0, 0, 0])
