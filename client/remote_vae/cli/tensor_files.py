"""Tensor files, bytes to `RawTensor` and back: safetensors, .npy and .pt, told apart by what the bytes are.

Nothing here unpickles: numpy refuses objects, torch is told `weights_only=True` and is imported for .pt alone. Of safetensors the
raw bytes are asked for, since `safetensors.numpy` has no bfloat16.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from remote_vae.errors import BadRequest
from remote_vae.protocol.tensors import RawTensor, from_array, to_numpy, to_torch

SUFFIXES = (".safetensors", ".npy", ".pt")
TENSOR_NAME = "latents"
"""What the tensor is called in a safetensors that is written here."""

_NPY = b"\x93NUMPY"
_PT = (b"PK\x03\x04", b"\x80\x02")  # torch's zip, and what torch wrote before it
_NPY_LOCK = threading.Lock()
"""Around `numpy.load`, which parses a header with `ast.literal_eval`: two threads that do it at once fail now and then with a
SystemError (python/cpython#106905: one count of the recursion's depth for all threads)."""
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "U8": "uint8"}


class UnreadableTensor(ValueError):
    """The bytes are no tensor of these formats, or hold several; the sentence follows the name of a file."""


def parse(data: bytes, key: str | None = None) -> RawTensor:
    """The tensor in the bytes of a file; float64 becomes float32, the widest that travels.

    Args:
        key: its name, where there are several.

    Raises:
        UnreadableTensor
    """
    try:
        if data.startswith(_NPY):
            with _NPY_LOCK:
                array = np.load(io.BytesIO(data), allow_pickle=False)
            return of_array(array)
        return _of_pt(data, key) if data.startswith(_PT) else _of_safetensors(data, key)
    except UnreadableTensor:
        raise
    except BadRequest as error:
        raise UnreadableTensor(f"cannot be sent: {error.message}") from error
    except Exception as error:  # damaged and hostile files: each parser has its own ways to fail
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableTensor(f"cannot be read as safetensors, .npy or .pt: {reason}") from error


def of_array(array: np.ndarray[Any, Any]) -> RawTensor:
    """A numpy array as it travels. `tensors.from_array` asks what torch is, which another thread may be importing.

    Raises:
        BadRequest: of a dtype that does not travel.
    """
    with np.errstate(over="ignore"):  # an infinity, which the server names
        plain = array.astype(np.float32) if array.dtype == np.float64 else array
    flat = np.ascontiguousarray(plain, plain.dtype.newbyteorder("<")).reshape(-1)
    return RawTensor(np.frombuffer(flat.tobytes(), np.uint8), plain.dtype.name, plain.shape)


def _of_safetensors(data: bytes, key: str | None) -> RawTensor:
    if data[8:9] != b"{" or int.from_bytes(data[:8], "little") > len(data) - 8:
        raise UnreadableTensor("is neither safetensors nor .npy nor .pt")
    try:
        fields: dict[str, Any] = dict(sorted(deserialize(data)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        if "not fully covered" in str(error):
            raise UnreadableTensor("is a safetensors that was cut off, or holds more than its tensors") from error
        raise
    field = _chosen(fields, {name: list(field["shape"]) for name, field in fields.items()}, key)
    buffer = np.frombuffer(field["data"], np.uint8)
    if field["dtype"] == "F64":
        return of_array(buffer.view("<f8").reshape(field["shape"]))
    if field["dtype"] not in _NAMES:
        raise UnreadableTensor(f"holds {field['dtype']}; cast it to one of F16, BF16, F32")
    return RawTensor(buffer, _NAMES[field["dtype"]], tuple(field["shape"]))


def _of_pt(data: bytes, key: str | None) -> RawTensor:
    try:
        import torch
    except ImportError:
        raise UnreadableTensor("needs torch to be read (pip install torch); .safetensors and .npy do not") from None
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(loaded, Mapping):
        tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        loaded = _chosen(tensors, {name: list(value.shape) for name, value in tensors.items()}, key)
    if not isinstance(loaded, torch.Tensor):
        raise UnreadableTensor(f"holds a {type(loaded).__name__}; expected a tensor or a dictionary of tensors")
    return from_array(loaded.float() if loaded.dtype == torch.float64 else loaded)


def _chosen(values: Mapping[str, Any], shapes: Mapping[str, list[int]], key: str | None) -> Any:
    """The value of that key, or the only one; ComfyUI puts an empty tensor beside its latents, which does not count."""
    names = [name for name, shape in shapes.items() if 0 not in shape]
    if key is not None and key in values:
        return values[key]
    if key is None and len(names) == 1:
        return values[names[0]]
    listed = ", ".join(f"{name} {shapes[name]}" for name in names[:8]) + (", ..." if len(names) > 8 else "")
    if key is not None:
        raise UnreadableTensor(f"has no tensor {key!r}; it has {listed or 'none'}")
    raise UnreadableTensor(
        f"holds {len(names)} tensors; choose one with --key: {listed}" if names else "holds no tensor"
    )


def render(raw: RawTensor, suffix: str) -> bytes:
    """The tensor as the bytes of a file of that suffix, one of `SUFFIXES`. A .npy cannot hold bfloat16: float32 there.

    Raises:
        UnreadableTensor: a .pt without torch.
    """
    if suffix == ".safetensors":
        # By hand: what `safetensors.serialize` takes differs from version to version.
        dtype = next(name for name, ours in _NAMES.items() if ours == raw.dtype)
        field = {"dtype": dtype, "shape": raw.shape, "data_offsets": (0, raw.data.nbytes)}
        header = json.dumps({TENSOR_NAME: field}).encode()
        header += b" " * (-len(header) % 8)  # so that the data begins where any dtype may be viewed
        return len(header).to_bytes(8, "little") + header + raw.data.tobytes()
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, to_numpy(raw), allow_pickle=False)
        return out.getvalue()
    try:
        import torch
    except ImportError:
        raise UnreadableTensor("needs torch to be written (pip install torch); .safetensors and .npy do not") from None
    torch.save(to_torch(raw).clone(), out)
    return out.getvalue()
