"""An mp4 is what was asked for: frames, size, rate, colours; and the encoder's death is an error that says so."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from in_process import diffusers_engine, pipeline_of
from reading import frames, psnr, read
from remote_vae.errors import InternalError
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.codecs.mp4 import to_mp4
from samples import latents, save_tiny_vae


def test_the_frames_come_back_at_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    made = frames(17, 96, 128)
    shown = read(to_mp4([made], tuple(made.shape), 15), tmp_path)
    assert (shown.codec, shown.pixel_format, shown.fps) == ("h264", "yuv420p", 15)
    assert shown.frames.shape == tuple(made.shape)
    assert psnr(shown.frames, made) > 38
    assert (
        abs(float(shown.frames.mean()) - float(made.float().mean())) < 0.5
    )  # rounded, not truncated; no shift of levels


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (33, 35), (2, 2), (1, 1)])
def test_odd_edges_are_repeated_once(tmp_path: Path, height: int, width: int) -> None:
    made = frames(3, height, width)
    shown = read(to_mp4([made], tuple(made.shape), 8), tmp_path).frames
    assert shown.shape == (3, height + height % 2, width + width % 2, 3)


def test_one_frame_is_a_video_and_a_rate_may_be_a_fraction(tmp_path: Path) -> None:
    shown = read(to_mp4([frames(1, 32, 32)], (1, 32, 32, 3), 23.976), tmp_path)
    assert len(shown.frames) == 1
    assert shown.fps == pytest.approx(23.98, abs=0.01)


def test_the_index_comes_before_the_frames_so_that_players_need_not_wait() -> None:
    mp4 = to_mp4([frames(5, 32, 32)], (5, 32, 32, 3), 8)
    assert 0 < mp4.index(b"moov") < mp4.index(b"mdat")


def test_no_file_is_left_and_no_descriptor_either() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        to_mp4([frames(2, 16, 16)], (2, 16, 16, 3), 8)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_encoder_that_dies_in_the_middle_is_an_error_and_the_next_request_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "ffmpeg"
    dying.write_text("#!/bin/sh\nhead -c 1000 > /dev/null\necho 'out of ideas' >&2\nexit 7\n")
    dying.chmod(0o755)
    pipeline = pipeline_of(diffusers_engine(save_tiny_vae("hunyuan", tmp_path / "vae")))
    request = DecodeRequest(from_array(latents(1, 4, 3, 16, 16)), Scaling(own=True), Output.MP4)
    with monkeypatch.context() as patched:
        patched.setenv("IMAGEIO_FFMPEG_EXE", str(dying))
        with pytest.raises(InternalError, match="output_type=pt"):
            asyncio.run(pipeline.decode(request))
    result = asyncio.run(pipeline.decode(request))
    assert read(result.data.tobytes(), tmp_path).frames.shape == (9, 128, 128, 3)
