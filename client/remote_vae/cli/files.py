"""Files of the command line: read by what their bytes are, whatever their names say; written whole or not at all, and never
over one that is there unless that is asked for. `-` is standard input or output."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from remote_vae.cli import tensor_files
from remote_vae.cli.tensor_files import UnreadableTensor
from remote_vae.protocol.tensors import RawTensor

STDIO = Path("-")
TENSOR_SUFFIXES = (*tensor_files.SUFFIXES, ".sft", ".pth", ".latent")  # .latent: ComfyUI's, which are safetensors
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_READ_BY_THE_SERVER = ("PNG", "JPEG", "WEBP")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")


class FileError(Exception):
    """A file that cannot be read or written.

    Attributes:
        message: a sentence that says what to do.
        code: for machines: `unreadable_file`, `unwritable_file`, `file_exists`.
        of_many: the sentence for several files at once, where it is not worth one for each.
    """

    def __init__(self, message: str, code: str = "unreadable_file", of_many: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.of_many = of_many


def found(paths: Iterable[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that are meant: of a folder, those with one of the suffixes that are right in it, sorted.

    Raises:
        FileError: nothing there, or a folder without such a file.
    """
    files: list[Path] = []
    for path in paths:
        if path != STDIO and path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
            if not inside:
                raise FileError(f"{path} holds none of {', '.join(suffixes)}")
            files += inside
        elif path == STDIO or path.exists():
            files.append(path)
        else:
            raise FileError(f"{path} does not exist")
    return files


def read(path: Path) -> bytes:
    """The bytes of a file. Raises FileError."""
    try:
        data = sys.stdin.buffer.read() if path == STDIO else path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise FileError(f"{path} is empty")
    return data


def read_tensor(path: Path, key: str | None = None) -> RawTensor:
    """The tensor in a safetensors, .npy or .pt file.

    Args:
        key: its name, where there are several.

    Raises:
        FileError
    """
    data = read(path)
    if data.startswith(_MAGIC):
        raise FileError(f"{path} is a picture, not a tensor; `remote-vae encode` makes latents of pictures")
    return _parsed(data, path, key)


def read_image(path: Path, key: str | None = None) -> RawTensor | np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What an encode takes: the bytes of a PNG, JPEG or WebP as they are; the pixels of another picture, uint8 `[H, W, 3]`; or
    the tensor in a file of tensors.

    Raises:
        FileError
    """
    data = read(path)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format in _READ_BY_THE_SERVER:
                return np.frombuffer(data, np.uint8)
            return tensor_files.of_array(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))
    except UnidentifiedImageError:
        return _parsed(data, path, key)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path} is no readable picture: {error}") from error


def _parsed(data: bytes, path: Path, key: str | None) -> RawTensor:
    try:
        return tensor_files.parse(data, key)
    except UnreadableTensor as error:
        raise FileError(f"{path} {error}") from error


def check_free(path: Path) -> None:
    """Raises FileError where a file is there, which --force would overwrite."""
    if path != STDIO and path.exists():
        way_out = "--force overwrites, --skip-existing leaves out"
        raise FileError(f"{path} exists: {way_out}", "file_exists", f"The files exist: {way_out}")


def write(path: Path, data: bytes) -> None:
    """The whole file or none of it: under another name first, so that no reader and no Ctrl-C finds half of one.

    Raises:
        FileError
    """
    if path == STDIO:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    part = path.with_name(f".{os.getpid()}-{path.name[-80:]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}", "unwritable_file") from error
