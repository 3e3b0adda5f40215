"""Values to messages and back: no field is lost, no value of an enum is forgotten."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import Message

from cached import types
from cached.errors import InvalidRequestError, all_errors
from cached.level import Level
from cached.rpc import converters as convert
from cached.rpc.errors import STATUS
from cached.types import (
    ByteRange,
    CheckedBy,
    Damage,
    Damaged,
    Event,
    PullPhase,
    PullProgress,
    RangesReady,
)
from cached_client._proto import cached_pb2 as pb
from tests.unit.rpc_support import COMPLETE, DETAIL, LEASE, OPENED, STATS, SUMMARY, TIER_CHANGE

DAMAGE = Damage("tiny", "r1", "a", "ab", Level.L2, 3, 48, 16, True, "why")
PROGRESS = PullProgress(
    PullPhase.VERIFYING, "tiny", "r1", 10, 9, 8, 7, 6, 0.5, ("note",), Level.L3, CheckedBy.ORIGIN_CHECKSUM
)


def unset(message: Message) -> set[str]:
    """Fields of a message, and of those within it, that hold nothing."""
    names = {field.name for field in message.DESCRIPTOR.fields} - {field.name for field, _ in message.ListFields()}
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner: list[Any] = [value] if isinstance(value, Message) else list(value)
        names |= {f"{field.name}.{name}" for item in inner for name in unset(item)}
    return names


@pytest.mark.parametrize(
    "message",
    [
        convert.progress_message(PROGRESS),
        convert.summary_message(SUMMARY),
        convert.detail_message(DETAIL),
        convert.lease_message(LEASE),
        convert.verify_message(types.VerifyProgress(5, 4, DAMAGE, True, 2, 1)),
        convert.stats_message(STATS),
        convert.tier_change_message(TIER_CHANGE),
        convert.trace_message([types.Attached(1.0, "tiny", 100, 2.0)]),
        convert.event_message(Event(1.0, "evicted", "tiny", "r1", "gone", {"level": "l1"})),
    ],
    ids=lambda message: message.DESCRIPTOR.name,
)
def test_a_full_value_fills_every_field(message: Message) -> None:
    assert unset(message) == set()


def test_attach_events() -> None:
    selected = types.Selected((types.SelectedTensor(1, "t", "BF16", (2, 3), 8, 20),), (0, 2))
    complete = dataclasses.replace(COMPLETE, partial=True)
    opened = convert.attach_message(
        dataclasses.replace(OPENED, complete=complete, selected=selected), "/run/fd.sock"
    ).opened
    assert unset(opened) == {"files.index"}
    assert opened.complete == convert.attach_message(complete, "").complete
    tensor = pb.Selected.Tensor(file_index=1, name="t", dtype="BF16", shape=[2, 3], begin=8, end=20)
    assert opened.selected == pb.Selected(tensors=[tensor], files=[0, 2])
    assert unset(convert.attach_message(OPENED, "x").opened) == {"files.index", "complete", "selected"}
    ranges = convert.attach_message(RangesReady((ByteRange(1, 2, 3),)), "").ranges_ready.ranges
    assert [(item.file_index, item.offset_bytes, item.length_bytes) for item in ranges] == [(1, 2, 3)]
    damaged = convert.attach_message(Damaged(1, 2, 3), "").damaged
    assert (damaged.file_index, damaged.offset_bytes, damaged.length_bytes) == (1, 2, 3)


def test_a_lease_without_credentials_says_so() -> None:
    lease = convert.lease_message(dataclasses.replace(LEASE, peer=None))
    assert (lease.peer_pid, lease.peer_uid) == (-1, -1)


@pytest.mark.parametrize(
    ("table", "kind", "numbers"),
    [
        (convert.LEVELS, Level, pb.Level),
        (convert.TIERS, types.Tier, pb.Tier),
        (convert.STATES, types.RevisionState, pb.RevisionState),
        (convert.PHASES, types.PullPhase, pb.PullProgress.Phase),
    ],
)
def test_enums_match_value_for_value(table: dict[Any, int], kind: Any, numbers: Any) -> None:
    assert set(table) == set(kind)
    assert set(table.values()) == {number for number in numbers.values() if number}
    for value, number in table.items():
        assert numbers.Name(number).endswith(f"_{value.value.upper()}")


def test_requests_enums() -> None:
    assert convert.tier_of(0) is None
    assert convert.tier_of(pb.TIER_AUTO) is types.Tier.AUTO
    assert convert.level_of(0) is None
    assert convert.level_of(pb.LEVEL_L2) is Level.L2
    for call, number in ((convert.tier_of, 77), (convert.level_of, 77), (convert.level_of, int(pb.LEVEL_L3))):
        with pytest.raises(InvalidRequestError) as caught:
            call(number)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("converted", "value"),
    [
        (convert.seconds_of, float("nan")), (convert.seconds_of, float("inf")), (convert.seconds_of, -1.0),
        (convert.time_of, float("nan")), (convert.time_of, -1.0), (convert.time_of, float("-inf")),
    ],
)  # fmt: skip
def test_numbers_that_are_no_time_are_refused(converted: Any, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"number is {value:g}") as caught:
        converted("number", value)
    assert caught.value.hint


def test_a_selection_is_passed_on_and_an_empty_or_endless_one_is_refused() -> None:
    held = pb.RangesReady.Range(file_index=1, offset_bytes=2, length_bytes=3)
    message = pb.Selection(tensors=["a.*"], files=["b"], rest_follows=True, held=[held])
    assert convert.selection_of(message) == types.Selection(("a.*",), ("b",), True, (ByteRange(1, 2, 3),))
    assert convert.selection_of(pb.Selection(held=[held])).held
    for wrong in (pb.Selection(), pb.Selection(tensors=["x"] * 10_001), pb.Selection(files=["x" * 1025])):
        with pytest.raises(InvalidRequestError) as caught:
            convert.selection_of(wrong)
        assert caught.value.hint


def test_times_are_passed_and_infinity_is_one() -> None:
    assert convert.time_of("at_time_s", 1_800_000_000.0) == 1_800_000_000.0
    assert convert.time_of("at_time_s", float("inf")) == float("inf")
    assert convert.seconds_of("keep_alive_s", 0.0) == 0.0


def test_of_those_that_would_go_before_twenty_are_named() -> None:
    before = tuple(f"m{number}" for number in range(50))
    place = dataclasses.replace(DETAIL.places[0], evicted_before=before)
    (message,) = convert.detail_message(dataclasses.replace(DETAIL, places=(place,))).places
    assert list(message.evicted_before) == list(before[:20])
    assert message.evicted_before_count == 50


def test_text_that_utf8_cannot_hold_is_replaced() -> None:
    message = convert.event_message(Event(1.0, "x", message="a\udcff", fields={"path": "b\udcff"}))
    assert (message.message, message.fields["path"]) == ("a?", "b?")


def test_every_error_has_a_status() -> None:
    assert set(STATUS) == set(all_errors().values())
