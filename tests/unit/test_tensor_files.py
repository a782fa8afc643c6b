"""Tensors in files: what torch and safetensors wrote is read, and the other way round, to the bit; nothing in a file runs."""

from __future__ import annotations

import gc
import io
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from remote_vae.cli.tensor_files import SUFFIXES, UnreadableTensor, parse, render
from remote_vae.protocol.tensors import RawTensor, from_array, to_numpy, to_torch
from samples import latents

Z = latents(1, 4, 3, 5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def pt(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def same(raw: RawTensor, expected: torch.Tensor) -> bool:
    tensor = to_torch(raw)
    return tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_and_safetensors_wrote_is_read(dtype: torch.dtype) -> None:
    z = Z.to(dtype)
    assert same(parse(save({"anything": z}, {"about": "it"})), z)
    assert same(parse(pt(z)), z)
    assert same(parse(pt({"step": 3, "z": z})), z)
    assert same(parse(pt(z, _use_new_zipfile_serialization=False)), z)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_was_there(dtype: torch.dtype, suffix: str) -> None:
    z = Z.to(dtype)
    written = render(from_array(z), suffix)
    expected = z.float() if suffix == ".npy" and dtype == torch.bfloat16 else z
    assert same(parse(written), expected)
    if suffix == ".safetensors":
        assert torch.equal(load(written)["latents"], z)
    elif suffix == ".pt":
        assert torch.equal(torch.load(io.BytesIO(written), weights_only=True), z)
    else:
        assert np.array_equal(np.load(io.BytesIO(written)), expected.numpy())


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_numpy_arrays_are_read_in_any_order_of_bytes_and_axes(dtype: str) -> None:
    array = np.asfortranarray(Z.numpy().astype(dtype))
    raw = parse(npy(array))
    assert raw.dtype == ("float16" if dtype == "<f2" else "float32")
    assert np.array_equal(to_numpy(raw), array)


def test_many_threads_read_numpy_arrays_at_once() -> None:
    """Python's own parser fails where another thread parses too; it is left in the middle when the garbage collector runs."""
    data, before = npy(Z.numpy()), gc.get_threshold()

    def switch(phase: str, info: dict[str, int]) -> None:
        time.sleep(1e-4)

    gc.callbacks.append(switch)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(parse, [data] * 800))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(switch)
    assert all(same(raw, Z) for raw in read)


def test_float64_becomes_float32_in_every_format() -> None:
    for data in (npy(Z.double().numpy()), pt(Z.double()), save({"z": Z.double()})):
        assert same(parse(data), Z)


def test_a_value_that_float32_cannot_hold_is_left_for_the_server_to_name() -> None:
    assert np.isinf(to_numpy(parse(npy(np.array([1e300]))))).all()


def test_the_empty_tensor_that_comfyui_puts_beside_its_latents_does_not_count() -> None:
    assert same(parse(save({"latent_tensor": Z, "latent_format_version_0": torch.empty(0)})), Z)


@pytest.mark.parametrize("write", [save, pt])
def test_one_of_several_is_chosen_by_its_name(write: Any) -> None:
    data = write({"first": Z, "second": Z[..., 1:].contiguous()})
    assert same(parse(data, "second"), Z[..., 1:])
    with pytest.raises(UnreadableTensor, match=r"--key: first \[1, 4, 3, 5\], second \[1, 4, 3, 4\]"):
        parse(data)
    with pytest.raises(UnreadableTensor, match=r"no tensor 'third'; it has first"):
        parse(data, "third")


@pytest.mark.parametrize("data", [npy(np.arange(3)), pt(torch.arange(3)), save({"z": torch.arange(3)}), pt([1, 2])])
def test_what_holds_no_floats_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableTensor):
        parse(data)


def test_a_file_that_was_cut_off_is_called_that() -> None:
    whole = save({"z": Z})
    for data in (whole[:-1], whole[: -Z.nbytes // 2]):
        with pytest.raises(UnreadableTensor, match="is a safetensors that was cut off"):
            parse(data)


class Mischief:
    """What a pickle can do to who reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


HOSTILE = {
    "pickle.pt": pickle.dumps(Mischief(), protocol=2),
    "empty.npy": b"",
    "text.safetensors": b"latents",
    "long header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
    "no tensor.safetensors": (2).to_bytes(8, "little") + b"{}",
    "list.safetensors": (2).to_bytes(8, "little") + b"[]",
    "deep.safetensors": (40006).to_bytes(8, "little") + b'{"a":' + b"[" * 40000 + b"}",
    "zip.pt": b"PK\x03\x04" + bytes(40),
    "huge.npy": b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,)}",
}


def safetensors_of(field: str) -> bytes:
    header = b'{"a": %s}' % field.encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


HOSTILE |= {
    f"{number}.safetensors": safetensors_of(field)
    for number, field in enumerate(
        (
            '{"dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [0, 17]}',
            '{"dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [-16, 0]}',
            '{"dtype": "F32", "shape": [1, 1, 2, 3], "data_offsets": [0, 16]}',
            '{"dtype": "F32", "shape": [-1, -1, 2, 2], "data_offsets": [0, 16]}',
            '{"dtype": "I8", "shape": [1, 1, 4, 4], "data_offsets": [0, 16]}',
            '{"dtype": "F32", "shape": "four", "data_offsets": [0, 16]}',
            '{"dtype": "F32"}',
            '"F32"',
        )
    )
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_sentence_and_nothing_of_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableTensor) as caught:
        parse(HOSTILE[name])
    assert 5 < len(str(caught.value)) < 400
    assert not os.listdir()


def test_objects_in_npy_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableTensor):
        parse(npy(np.array([Mischief()], object), allow_pickle=True))
    assert not os.listdir()
