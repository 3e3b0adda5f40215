"""The ledger against two dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cached.errors import NoRoomError
from cached.ledger import AccountingError, Ledger
from cached.level import Level

IDS = st.sampled_from("abcd")
KEYS = st.sampled_from(["pool", "blob:1", "blob:2", "withdrawn:1", "withdrawn:2"])
SIZES = st.integers(0, 120)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(Level.L1, 100)
        self.capacity = 100
        self.used: dict[str, int] = {}
        self.reserved: dict[str, int] = {}

    @property
    def room(self) -> int:
        return max(0, self.capacity - sum(self.used.values()) - sum(self.reserved.values()))

    def refused_for_room(self, grow: int) -> bool:
        return grow > self.room

    @rule(ingest=IDS, size=SIZES)
    def reserve(self, ingest: str, size: int) -> None:
        if ingest in self.reserved:
            with pytest.raises(AccountingError):
                self.ledger.reserve(ingest, size)
        elif self.refused_for_room(size):
            with pytest.raises(NoRoomError) as refused:
                self.ledger.reserve(ingest, size)
            assert refused.value.fields["available_bytes"] == str(self.room)
            assert refused.value.fields["fits"] == ("never" if size > self.capacity else "later")
        else:
            self.ledger.reserve(ingest, size)
            self.reserved[ingest] = size

    @rule(ingest=IDS, key=KEYS)
    def commit(self, ingest: str, key: str) -> None:
        if ingest not in self.reserved or key in self.used:
            with pytest.raises(AccountingError):
                self.ledger.commit(ingest, key)
        else:
            self.ledger.commit(ingest, key)
            self.used[key] = self.reserved.pop(ingest)

    @rule(ingest=IDS)
    def release(self, ingest: str) -> None:
        if ingest not in self.reserved:
            with pytest.raises(AccountingError):
                self.ledger.release(ingest)
        else:
            assert self.ledger.release(ingest) == self.reserved.pop(ingest)

    @rule(key=KEYS, size=SIZES)
    def add(self, key: str, size: int) -> None:
        if key in self.used:
            with pytest.raises(AccountingError):
                self.ledger.add(key, size)
        elif self.refused_for_room(size):
            with pytest.raises(NoRoomError):
                self.ledger.add(key, size)
        else:
            self.ledger.add(key, size)
            self.used[key] = size

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        if key not in self.used:
            with pytest.raises(AccountingError):
                self.ledger.remove(key)
        else:
            assert self.ledger.remove(key) == self.used.pop(key)

    @rule(old=KEYS, new=KEYS)
    def move(self, old: str, new: str) -> None:
        if old not in self.used or new in self.used:
            with pytest.raises(AccountingError):
                self.ledger.move(old, new)
        else:
            self.ledger.move(old, new)
            self.used[new] = self.used.pop(old)

    @rule(key=KEYS, size=SIZES)
    def resize(self, key: str, size: int) -> None:
        if size > (old := self.used.get(key, 0)) and self.refused_for_room(size - old):
            with pytest.raises(NoRoomError):
                self.ledger.resize(key, size)
            return
        self.ledger.resize(key, size)
        self.used.pop(key, None)
        if size:
            self.used[key] = size

    @rule(capacity=st.integers(0, 150))
    def set_capacity(self, capacity: int) -> None:
        self.ledger.capacity_bytes = self.capacity = capacity

    @invariant()
    def agrees(self) -> None:
        self.ledger.check()
        assert dict(self.ledger.used) == self.used
        assert dict(self.ledger.reservations) == self.reserved
        assert self.ledger.used_bytes == sum(self.used.values())
        assert self.ledger.reserved_bytes == sum(self.reserved.values())
        assert self.ledger.available_bytes == self.room
        assert self.ledger.excess_bytes == max(0, sum(self.used.values()) + sum(self.reserved.values()) - self.capacity)


class FixedCapacityMachine(LedgerMachine):
    """With a capacity that stays, it is never exceeded (invariant 2)."""

    def set_capacity(self) -> None:
        """No rule here."""

    @invariant()
    def within_capacity(self) -> None:
        assert self.ledger.used_bytes + self.ledger.reserved_bytes <= 100


TestLedger = LedgerMachine.TestCase
TestLedgerWithinCapacity = FixedCapacityMachine.TestCase
