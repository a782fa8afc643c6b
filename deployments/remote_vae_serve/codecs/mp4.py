"""MP4 encoder of frames: H.264 in yuv420p with its index in front, so that a browser plays it while it loads. Made by ffmpeg,
fed through a pipe, written to memory: no file, named or not, touches a disk."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import imageio_ffmpeg
import torch

from remote_vae.errors import InternalError

logger = logging.getLogger("ray.serve")

CONSTANT_RATE = 18  # visually lossless
PRESET = "veryfast"
COLOURS = (
    "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=bicubic+accurate_rnd+full_chroma_int,"
    "setparams=color_primaries=bt709:color_trc=bt709"
)


def to_mp4(pieces: Iterable[torch.Tensor], shape: tuple[int, ...], fps: float) -> bytes:
    """An mp4 of frames, which are fed to the encoder as they come.

    Args:
        pieces: the frames, uint8 `[t, H, W, 3]` on the host, some at a time. An odd edge is repeated once: yuv420p has half as
            many colour samples as pixels along each edge.
        shape: of all of them, `[T, H, W, 3]`.
        fps: frames a second.

    Returns:
        The file.

    Raises:
        InternalError: the encoder failed.
    """
    height, width = shape[1:3]
    # What it complains goes to memory too: in a pipe that nobody reads it could wait for us while we wait for it.
    with _memory_file("mp4") as output, _memory_file("complaints") as complaints:
        command = _command(width + width % 2, height + height % 2, fps, f"/proc/self/fd/{output}")
        encoder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints, pass_fds=[output]
        )
        assert encoder.stdin is not None
        try:
            with suppress(BrokenPipeError), encoder.stdin:  # it died; its exit status and last words follow
                for frames in pieces:
                    for frame in _even(frames):
                        encoder.stdin.write(frame.numpy().data)
            encoder.wait()
        finally:
            encoder.kill()  # where the frames did not come; else it has ended
            encoder.wait()
        if encoder.returncode != 0:
            last = _read(complaints)[-2000:].decode(errors="replace")
            logger.error("ffmpeg ended with %s: %s", encoder.returncode, last)
            raise InternalError(
                "The video encoder failed; the server's log says more. Frames are to be had with output_type=pt"
            )
        return _read(output)


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as written:
        written.seek(0)
        return written.read()


def _even(frames: torch.Tensor) -> torch.Tensor:
    height, width = frames.shape[1:3]
    frames = torch.cat([frames, frames[:, -1:]], dim=1) if height % 2 else frames
    frames = torch.cat([frames, frames[:, :, -1:]], dim=2) if width % 2 else frames
    return frames.contiguous()


@contextmanager
def _memory_file(name: str) -> Iterator[int]:
    """A seekable file that is nowhere but in memory (Linux): an mp4's index is moved to its front at the end."""
    descriptor = os.memfd_create(name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _command(width: int, height: int, fps: float, output: str) -> list[str]:
    return [
        imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-nostdin", "-y",
        "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", f"{fps:g}", "-i", "pipe:0",
        # Players take unmarked small videos for BT.601 and large ones for BT.709; say which, and convert by it.
        "-vf", COLOURS, "-pix_fmt", "yuv420p",
        "-c:v", "libx264", "-preset", PRESET, "-crf", str(CONSTANT_RATE), "-movflags", "+faststart", "-f", "mp4", output,
    ]  # fmt: skip
