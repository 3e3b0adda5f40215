from __future__ import annotations

import pytest

from cached.errors import NoRoomError
from cached.ledger import AccountingError, Ledger
from cached.level import Level
from cached.units import GIB


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Level.L1, 100)


def test_reservation_becomes_an_entry(ledger: Ledger) -> None:
    ledger.reserve("a", 60)
    assert (ledger.used_bytes, ledger.reserved_bytes, ledger.available_bytes) == (0, 60, 40)
    ledger.commit("a", "blob:1")
    assert (ledger.used_bytes, ledger.reserved_bytes, ledger.available_bytes) == (60, 0, 40)
    assert dict(ledger.used) == {"blob:1": 60}
    assert ledger.remove("blob:1") == 60
    assert ledger.available_bytes == 100
    ledger.check()


def test_no_room_now_is_told_apart_from_never(ledger: Ledger) -> None:
    ledger.reserve("a", 60)
    with pytest.raises(NoRoomError) as later:
        ledger.reserve("b", 41)
    assert later.value.fields == {
        "level": "l1",
        "needed_bytes": "41",
        "available_bytes": "40",
        "capacity_bytes": "100",
        "fits": "later",
    }
    assert "retry later" in later.value.hint
    with pytest.raises(NoRoomError) as never:
        ledger.reserve("b", 101)
    assert never.value.fields["fits"] == "never"
    assert "never fit" in never.value.hint
    assert ledger.reserved_bytes == 60


def test_message_is_for_people() -> None:
    with pytest.raises(NoRoomError, match=r"l2 has no room for 3\.0 GiB: 2\.0 GiB of 2\.0 GiB are free"):
        Ledger(Level.L2, 2 * GIB).reserve("a", 3 * GIB)


def test_exact_fit_and_empty_blobs(ledger: Ledger) -> None:
    ledger.reserve("a", 100)
    ledger.reserve("empty", 0)
    ledger.commit("empty", "blob:empty")
    assert ledger.available_bytes == 0


def test_lowered_capacity_is_never_negative(ledger: Ledger) -> None:
    ledger.add("blob:1", 80)
    ledger.capacity_bytes = 50
    assert (ledger.available_bytes, ledger.excess_bytes) == (0, 30)
    with pytest.raises(NoRoomError):
        ledger.reserve("a", 1)
    ledger.check()
    ledger.remove("blob:1")
    assert (ledger.available_bytes, ledger.excess_bytes) == (50, 0)


def test_withdrawn_bytes_stay_used(ledger: Ledger) -> None:
    ledger.add("blob:1", 80)
    ledger.move("blob:1", "withdrawn:1")
    assert dict(ledger.used) == {"withdrawn:1": 80}
    assert ledger.used_bytes == 80


def test_resize_grows_within_room_and_drops_at_zero(ledger: Ledger) -> None:
    ledger.resize("pool", 70)
    ledger.resize("pool", 90)
    with pytest.raises(NoRoomError):
        ledger.resize("pool", 101)
    assert ledger.used_bytes == 90
    ledger.resize("pool", 0)
    assert dict(ledger.used) == {}
    ledger.check()


def test_misuse_is_loud_and_changes_nothing(ledger: Ledger) -> None:
    ledger.reserve("a", 10)
    ledger.add("blob:1", 10)
    for misuse in (
        lambda: ledger.reserve("a", 1),
        lambda: ledger.commit("a", "blob:1"),
        lambda: ledger.commit("b", "blob:2"),
        lambda: ledger.release("b"),
        lambda: ledger.add("blob:1", 1),
        lambda: ledger.remove("blob:2"),
        lambda: ledger.move("blob:2", "blob:3"),
        lambda: ledger.move("blob:1", "blob:1"),
        lambda: ledger.reserve("c", -1),
        lambda: ledger.resize("pool", -1),
    ):
        with pytest.raises(AccountingError):
            misuse()
    assert (dict(ledger.used), dict(ledger.reservations)) == ({"blob:1": 10}, {"a": 10})
    ledger.release("a")
    with pytest.raises(AccountingError):
        ledger.release("a")
    ledger.check()


def test_check_finds_wrong_totals(ledger: Ledger) -> None:
    ledger.add("blob:1", 10)
    ledger._used["blob:1"] = 11
    with pytest.raises(AccountingError, match="10 used"):
        ledger.check()
