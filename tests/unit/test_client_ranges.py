"""Announced ranges and the tensors they complete, against plain sets of positions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached_client._ranges import PendingTensors, RangeSet
from cached_client.safetensors_header import TensorInfo

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=20)


@given(added=RANGES, asked=RANGES)
def test_behaves_like_a_set_of_positions(added: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    ranges, positions = RangeSet(), set[int]()
    for begin, end in added:
        ranges.add(begin, end)
        positions |= set(range(begin, end))
    assert ranges.total() == len(positions)
    assert {at for begin, end in ranges.spans() for at in range(begin, end)} == positions
    for begin, end in asked:
        assert ranges.covers(begin, end) == (set(range(begin, end)) <= positions)


@given(added=RANGES)
def test_spans_are_in_order_and_never_touch(added: list[tuple[int, int]]) -> None:
    ranges = RangeSet()
    for begin, end in added:
        ranges.add(begin, end)
        edges = [edge for span in ranges.spans() for edge in span]
        assert edges == sorted(set(edges))


def tensors_of(sizes: list[int]) -> list[TensorInfo]:
    tensors, at = [], 0
    for index, size in enumerate(sizes):
        tensors.append(TensorInfo(str(index), "U8", (size,), at, at + size))
        at += size
    return tensors


@given(sizes=st.lists(st.integers(0, 9), max_size=12), steps=st.lists(RANGES, max_size=6))
def test_each_tensor_is_taken_once_and_as_soon_as_it_is_whole(
    sizes: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    tensors = tensors_of(sizes)
    pending, ranges, taken = PendingTensors(tensors), RangeSet(), list[TensorInfo]()
    for step in steps:
        for begin, end in step:
            ranges.add(begin, end)
        taken += pending.take(ranges.spans())
        whole = {info.name for info in tensors if info.size_bytes and ranges.covers(info.begin, info.end)}
        assert {info.name for info in taken if info.size_bytes} == whole
        assert len(taken) + len(pending) == len(tensors)
    total = sum(sizes)
    taken += pending.take([(0, total)])
    assert sorted(taken, key=lambda info: int(info.name)) == tensors
    assert not pending


def test_a_tensor_that_reaches_beyond_the_span_waits() -> None:
    pending = PendingTensors(tensors_of([4, 0, 4]))
    assert [info.name for info in pending.take([(0, 6)])] == ["0", "1"]
    assert [info.name for info in pending.take([(0, 8)])] == ["2"]


def test_what_has_no_bytes_waits_for_none() -> None:
    pending = PendingTensors(tensors_of([4, 0, 4, 0]))
    assert [info.name for info in pending.take_empty()] == ["1", "3"]
    assert len(pending) == 2
    assert pending.take_empty() == []
