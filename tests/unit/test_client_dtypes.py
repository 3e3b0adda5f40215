"""Every data type of the format, compared with what safetensors.torch makes of the same bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from cached_client.dtypes import DTYPES
from cached_client.errors import UnsupportedDtypeError
from cached_client.numpy import array_from_view
from cached_client.safetensors_header import TensorInfo, parse_header
from cached_client.torch import tensor_from_view, tensors_from_view
from tests.unit.test_safetensors_header import build, entry

SIX_BITS = {"F6_E2M3", "F6_E3M2"}
TORCH_DTYPES = sorted(set(DTYPES) - SIX_BITS)
SHAPES: list[list[int]] = [[4], [3, 4], [2, 0, 4], [0], [1, 1, 1, 8], [5, 2]]


def content_of(dtype: str, shape: list[int]) -> bytes:
    """A file with one tensor of random bytes (zeros and ones for BOOL)."""
    bits = DTYPES[dtype].bits
    for extent in shape:
        bits *= extent
    size_bytes = bits // 8
    data = np.random.default_rng(3).integers(0, 2 if dtype == "BOOL" else 256, size_bytes, dtype=np.uint8).tobytes()
    # Padded as safetensors itself does, so that the data begins at a multiple of eight.
    header = build({"t": entry(dtype, shape, 0, size_bytes)})[8:]
    return build(header + b" " * (-len(header) % 8)) + data


def ours(content: bytes, make: Any = tensor_from_view) -> Any:
    info = parse_header(content, len(content)).tensors["t"]
    return make(memoryview(bytearray(content))[info.begin : info.end], info)


def theirs(content: bytes, tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    return safetensors.torch.load_file(path)["t"]


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_equals_what_safetensors_loads(dtype: str, shape: list[int], tmp_path: Path) -> None:
    content = content_of(dtype, shape)
    expected, found = theirs(content, tmp_path), ours(content)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert as_bytes(found) == as_bytes(expected)


@pytest.mark.parametrize("dtype", sorted(set(TORCH_DTYPES) - {"F4"}))
def test_scalars(dtype: str, tmp_path: Path) -> None:
    content = content_of(dtype, [])
    assert ours(content).shape == torch.Size([])
    assert as_bytes(ours(content)) == as_bytes(theirs(content, tmp_path))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_round_trip_of_what_safetensors_saves(dtype: str) -> None:
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
    tensor = torch.arange(16, dtype=torch.uint8).fmod(2).view(torch_dtype)
    content = safetensors.torch.save({"t": tensor})
    found = ours(content)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert as_bytes(found) == as_bytes(tensor)


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", [4]), ("F6_E3M2", [2, 4]), ("F4", [2, 3]), ("F4", [0, 3])])
def test_refuses_what_safetensors_refuses(dtype: str, shape: list[int], tmp_path: Path) -> None:
    content = content_of(dtype, shape)
    with pytest.raises(SafetensorError):
        theirs(content, tmp_path)
    with pytest.raises(UnsupportedDtypeError, match="raw") as caught:
        ours(content)
    assert caught.value.fields == {"tensor": "t", "dtype": dtype}


def test_the_table_is_that_of_safetensors() -> None:
    with pytest.raises(SafetensorError) as caught:
        safetensors.deserialize(build({"t": entry("nope", [], 0, 0)}))
    known = {word.strip("`., ") for word in str(caught.value).split("expected one of")[1].split("at line")[0].split()}
    assert known == set(DTYPES)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_neighbours_made_together_are_those_made_alone(dtype: str, shift: int) -> None:
    file = bytearray(np.random.default_rng(4).integers(0, 2, 4096, dtype=np.uint8).tobytes())
    infos: list[TensorInfo] = []
    at = 64 + shift
    for shape in ((2, 4), (2, 4), (2, 4), (4, 2), (8,), (8,), (0, 2), (0, 2), (2, 4), (2, 4)):
        size_bytes = DTYPES[dtype].bits * int(np.prod(shape)) // 8
        infos.append(TensorInfo(str(len(infos)), dtype, shape, at, at + size_bytes))
        at += size_bytes
    del infos[-2]  # so that the last one does not follow the one before it
    begin = infos[0].begin
    together = tensors_from_view(memoryview(file)[begin:at], begin, infos)
    assert len(together) == len(infos)
    for info, found in zip(infos, together, strict=True):
        alone = tensor_from_view(memoryview(file)[info.begin : info.end], info)
        assert (found.dtype, found.shape, as_bytes(found)) == (alone.dtype, alone.shape, as_bytes(alone))
        assert found.untyped_storage().nbytes() == info.size_bytes
        if DTYPES[dtype].item_bytes == 1 or not shift:
            assert not info.size_bytes or found.data_ptr() == alone.data_ptr()


def test_a_misaligned_tensor_is_copied_and_right() -> None:
    data = np.arange(4, dtype=np.float32)
    buffer = bytearray(3) + bytearray(data.tobytes())
    info = TensorInfo("t", "F32", (4,), 3, 19)
    view = memoryview(buffer)[3:]
    tensor = tensor_from_view(view, info)
    assert torch.equal(tensor, torch.from_numpy(data.copy()))
    assert tensor.data_ptr() % 4 == 0
    assert np.array_equal(array_from_view(view, info), data)


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if dtype.numpy_name])
def test_numpy_sees_the_same_values(dtype: str) -> None:
    content = content_of(dtype, [2, 4])
    array, tensor = ours(content, array_from_view), ours(content)
    assert array.shape == (2, 4)
    assert array.tobytes() == bytes(as_bytes(tensor))
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if not dtype.numpy_name])
def test_numpy_says_what_it_cannot_do(dtype: str) -> None:
    if DTYPES[dtype].ml_dtypes_name and importlib.util.find_spec("ml_dtypes"):
        pytest.skip("ml_dtypes is installed")
    with pytest.raises(UnsupportedDtypeError, match=rf"no type for {dtype}.*tensor\(\)"):
        ours(content_of(dtype, [4]), array_from_view)


@pytest.mark.skipif(importlib.util.find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed")
@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if dtype.ml_dtypes_name])
def test_ml_dtypes_gives_numpy_the_rest(dtype: str) -> None:
    content = content_of(dtype, [2, 4])
    array = ours(content, array_from_view)
    assert array.shape == (2, 4)
    assert array.tobytes() == bytes(as_bytes(ours(content)))
