"""The layout on a device: slices as torch cuts them, arrivals in any order, alignment, buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cached_client._ranges import RangeSet
from cached_client.errors import InvalidRequestError
from cached_client.gpu.image import ALIGN_BYTES, Image
from cached_client.safetensors_header import TensorInfo, parse_header
from tests.unit.gpu_support import same

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "F64": torch.float64}


@st.composite
def tensors_and_slices(draw):
    tensors, slices = {}, {}
    for index in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 7), max_size=4))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        count = int(np.prod(shape, dtype=int))
        tensors[f"t{index}"] = torch.arange(count).remainder(251).to(dtype).reshape(shape)
        if shape and draw(st.booleans()):
            dim = draw(st.integers(-len(shape), len(shape) - 1))
            start = draw(st.integers(0, shape[dim]))
            slices[f"t{index}"] = (dim, start, draw(st.integers(start, shape[dim])))
    return tensors, slices


def carved(image: Image, memory: np.ndarray) -> dict[str, torch.Tensor]:
    flat = torch.from_numpy(memory)
    return {
        place.info.name: flat[place.offset : place.end].view(DTYPES[place.info.dtype]).reshape(place.shape)
        for place in image.places
        if place.size_bytes
    }


def expected_of(tensors, slices):
    return {
        name: tensor.narrow(slices[name][0], slices[name][1], slices[name][2] - slices[name][1])
        if name in slices
        else tensor
        for name, tensor in tensors.items()
    }


def windows(image: Image, low: int, high: int, size_bytes: int):
    for index, begin, end in image.parts(low, high):
        for at in range(begin, end, size_bytes):
            yield index, at, min(end, at + size_bytes)


@settings(deadline=None, max_examples=150)
@given(
    tensors_and_slices(),
    st.sampled_from([1, 7, 64, 4096]),
    st.one_of(st.none(), st.integers(1, 600)),
    st.integers(1, 64),
    st.randoms(use_true_random=False),
)
def test_what_arrives_in_any_order_makes_the_slices_that_torch_makes(case, window, buffer_bytes, chunk, random) -> None:
    tensors, slices = case
    content = save(tensors)
    header = parse_header(content, len(content))
    image = Image(header.tensors.values(), slices, buffer_bytes=buffer_bytes)
    memory = np.full(image.size_bytes, 0xAA, np.uint8)
    announced, planned = RangeSet(), RangeSet()
    chunks = [(at, min(len(content), at + chunk)) for at in range(0, len(content), chunk)]
    random.shuffle(chunks)
    for begin, end in chunks:
        announced.add(begin, end)
        for span in announced.spans():
            for gap in planned.gaps(*image.range_of(*span)):
                for buffer_index, low, high in windows(image, *gap, window):
                    assert image.buffers[buffer_index].begin <= low < high <= image.buffers[buffer_index].end
                    planned.add(low, high)
                    runs = image.runs(low, high)
                    if not runs:
                        continue
                    first, last = runs[0][1].begin, runs[-1][1].end
                    assert announced.covers(first, last)
                    source = np.frombuffer(content, np.uint8)[first:last]
                    image.gather(low, high, source, first, memory[low:high])
    for name, expected in expected_of(tensors, slices).items():
        place = next(place for place in image.places if place.info.name == name)
        assert place.shape == tuple(expected.shape)
        assert planned.covers(place.offset, place.end)
        assert place.offset % ALIGN_BYTES == 0
        if place.size_bytes:
            assert same(carved(image, memory)[name], expected)


def whole(*sizes: int) -> list[TensorInfo]:
    infos, at = [], 100
    for index, size in enumerate(sizes):
        infos.append(TensorInfo(f"t{index}", "U8", (size,), at, at + size))
        at += size
    return infos


def test_neighbours_that_need_no_gap_are_one_run() -> None:
    image = Image(whole(512, 1024, 256))
    assert [(at, rows.begin, rows.total_bytes) for at, rows in image.runs(0, image.size_bytes)] == [(0, 100, 1792)]


def test_a_tensor_at_an_odd_place_of_its_file_is_aligned_on_the_device() -> None:
    infos = [TensorInfo("a", "U8", (3,), 9, 12), TensorInfo("b", "F64", (2,), 12, 28)]
    assert [place.offset for place in Image(infos).places] == [0, 256]


def test_a_column_slice_is_gathered_in_rows_and_a_row_slice_is_one_run() -> None:
    infos = [TensorInfo("a", "F32", (8, 16), 0, 512)]
    columns = Image(infos, {"a": (1, 4, 8)}).runs(0, 128)
    assert [(at, rows.begin, rows.number, rows.size_bytes, rows.stride_bytes) for at, rows in columns] == [
        (0, 16, 8, 16, 64)
    ]
    rows = Image(infos, lambda info: (0, 2, 4)).runs(0, 128)
    assert [(at, rows.begin, rows.number, rows.size_bytes) for at, rows in rows] == [(0, 128, 1, 128)]


def test_a_packed_dtype_is_sliced_as_torch_holds_it() -> None:
    image = Image([TensorInfo("a", "F4", (4, 8), 0, 16)], {"a": (1, 1, 3)})
    assert image.places[0].shape == (4, 2)
    assert [(at, r.begin, r.number, r.size_bytes, r.stride_bytes) for at, r in image.runs(0, 8)] == [(0, 1, 4, 2, 4)]


def test_buffers_end_between_tensors() -> None:
    image = Image(whole(256, 256, 256, 5000, 10), buffer_bytes=512)
    assert [(b.begin, b.end, b.tensors) for b in image.buffers] == [
        (0, 512, 2),
        (512, 768, 1),
        (768, 5768, 1),
        (5888, 5898, 1),
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        (2, 0, 1), (-3, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, 5), (1, 0, 9),
        (), (0, 1), (0, 0, 1, 1), (0, 0.0, 2.0), (0, 0, None), ("0", "0", "1"), "abc", 1, slice(0, 1),
    ],
)  # fmt: skip
def test_a_slice_that_does_not_fit_is_refused(wanted) -> None:
    with pytest.raises(InvalidRequestError, match="does not fit 'a'"):
        Image([TensorInfo("a", "F32", (4, 8), 0, 128)], {"a": wanted})


def test_a_slice_may_be_of_any_integers() -> None:
    wanted: Any = np.array([-2, 1, 3])
    place = Image([TensorInfo("a", "F32", (4, 8), 0, 128)], {"a": wanted}).places[0]
    assert place.shape == (2, 8)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.integers(0, 40), st.integers(0, 40))
def test_gaps_and_the_range_around_a_position(ranges, begin: int, end: int) -> None:
    positions: set[int] = set()
    held = RangeSet()
    for first, second in ranges:
        held.add(first, second)
        positions.update(range(first, second))
    gaps = held.gaps(begin, end)
    assert {at for gap in gaps for at in range(*gap)} == set(range(begin, end)) - positions
    assert all(first < second for first, second in gaps)
    first, last = held.span_at(begin)
    assert set(range(first, last)) <= positions
    assert (begin in range(first, last)) == (begin in positions)
    assert first - 1 not in positions or begin not in positions
    assert last not in positions or begin not in positions
