"""Tensors as bytes: whatever goes in comes out bit for bit, and what is no tensor is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from remote_vae.errors import BadRequest
from remote_vae.protocol.tensors import ITEM_SIZE, MAX_DIMENSIONS, RawTensor, from_array, is_torch, to_numpy, to_torch

TORCH_DTYPES = [torch.float16, torch.float32, torch.bfloat16, torch.uint8]


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = numbers(dtype, 2, 3, 5)
    raw = from_array(tensor)
    assert (raw.dtype, raw.shape, raw.data.nbytes) == (
        str(dtype).removeprefix("torch."),
        (2, 3, 5),
        30 * dtype.itemsize,
    )
    back = to_torch(raw)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_numpy_comes_back_bit_for_bit(dtype: str) -> None:
    array = numbers(getattr(torch, dtype), 2, 3, 5).numpy()
    back = to_numpy(from_array(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_numpy_reads_bfloat16_as_float32_without_losing_a_bit() -> None:
    tensor = torch.cat([numbers(torch.bfloat16, 1000), torch.tensor([0.0, -0.0, 3e38, 1e-40]).bfloat16()])
    widened = to_numpy(from_array(tensor))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened.view(np.uint32), tensor.float().numpy().view(np.uint32))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 2), lambda t: t[:, ::2], lambda t: t.flip(0), lambda t: t[1:, 1:],
        lambda t: t.expand(4, -1, -1, -1),
    ],
    ids=["transposed", "strided", "flipped", "offset", "expanded"],
)  # fmt: skip
def test_a_view_travels_as_the_numbers_it_shows(view: Any) -> None:
    tensor = view(numbers(torch.float32, 4, 6, 5))
    assert torch.equal(to_torch(from_array(tensor)), tensor)
    np.testing.assert_array_equal(to_numpy(from_array(tensor.numpy())), tensor.numpy())


def test_a_tensor_with_a_gradient_travels() -> None:
    tensor = numbers(torch.float32, 3).requires_grad_()
    assert torch.equal(to_torch(from_array(tensor)), tensor.detach())


def test_big_endian_numbers_are_turned_round() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    raw = from_array(array)
    assert raw.data.tobytes() == array.astype("<f4").tobytes()
    np.testing.assert_array_equal(to_numpy(raw), array)


def test_contiguous_memory_is_not_copied() -> None:
    array, tensor = np.zeros((2, 3), np.float32), torch.zeros(2, 3)
    assert np.shares_memory(from_array(array).data, array)
    assert np.shares_memory(to_numpy(from_array(array)), array)
    assert to_torch(from_array(tensor)).data_ptr() == tensor.data_ptr()


def test_memory_of_another_process_is_copied_before_torch_may_write_to_it() -> None:
    """Torch has no read-only tensors, and warns; plasma's pages are read-only."""
    data = np.zeros(8, np.uint8)
    data.flags.writeable = False
    tensor = to_torch(RawTensor(data, "float32", (2,)))
    tensor += 1
    assert not data.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_bytes_at_an_odd_address_are_read(dtype: str) -> None:
    tensor = numbers(getattr(torch, dtype), 4)
    data = np.concatenate([np.zeros(1, np.uint8), from_array(tensor).data])[1:]
    raw = RawTensor(data, dtype, (4,))
    assert torch.equal(to_torch(raw), tensor)
    np.testing.assert_array_equal(to_numpy(raw), tensor.float().numpy())


def test_samples_are_views_along_the_first_axis() -> None:
    tensor = numbers(torch.bfloat16, 3, 4, 2)
    raw = from_array(tensor)
    samples = raw.samples()
    assert [sample.shape for sample in samples] == [(1, 4, 2)] * 3
    assert all(np.shares_memory(sample.data, raw.data) for sample in samples)
    assert torch.equal(torch.cat([to_torch(sample) for sample in samples]), tensor)


@pytest.mark.parametrize(
    ("size", "dtype", "shape", "parameter"),
    [
        (4, "float64", (1,), "dtype"),
        (4, "", (1,), "dtype"),
        (3, "float32", (1,), "shape"),
        (5, "float32", (1,), "shape"),
        (0, "float32", (1,), "shape"),
        (4, "float32", (), "shape"),
        (0, "float32", (0,), "shape"),
        (8, "float32", (-2, -1), "shape"),
        (4, "float32", (1,) * (MAX_DIMENSIONS + 1), "shape"),
        (4, "float32", (2**63, 2**63), "shape"),
    ],
)
def test_bytes_that_are_no_tensor_are_refused(size: int, dtype: str, shape: tuple[int, ...], parameter: str) -> None:
    with pytest.raises(BadRequest, match=parameter) as caught:
        RawTensor(np.zeros(size, np.uint8), dtype, shape)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    "value",
    [None, 3.0, [[1.0]], b"1234", "latents", torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.complex64),
     np.zeros(2, np.int64), np.array(["a"]), np.array([None])],
    ids=repr,
)  # fmt: skip
def test_what_does_not_travel_is_refused_by_name(value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        from_array(value)
    assert caught.value.parameter == "tensor"
    name = getattr(getattr(value, "dtype", None), "name", None) or str(getattr(value, "dtype", type(value).__name__))
    assert name.removeprefix("torch.") in caught.value.message


def test_only_torch_tensors_are_torch() -> None:
    assert is_torch(torch.zeros(1))
    assert not is_torch(np.zeros(1))


def test_every_dtype_has_torchs_item_size() -> None:
    assert {dtype: getattr(torch, dtype).itemsize for dtype in ITEM_SIZE} == ITEM_SIZE
