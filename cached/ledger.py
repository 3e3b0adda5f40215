"""The accounts of one level: which bytes are used, and which are promised to ingests. Pure bookkeeping, no I/O.

The ledger knows keys and sizes, nothing of blobs or segments: a key is what its caller makes it, such as
``blob:<sha256>``, ``withdrawn:<id>`` or ``pool``. All methods belong to the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from cached.errors import NoRoomError
from cached.level import Level
from cached.units import format_size


class AccountingError(RuntimeError):
    """A caller broke the ledger's rules (a double commit, an unknown key): a bug of ours, never a user's doing."""


class Ledger:
    """Keeps ``used + reserved <= capacity``: bytes are reserved before the first of them arrives.

    ``reserve`` → ``commit`` or ``release``, exactly once. Capacity may be lowered at run time below what is used; then
    nothing fits until enough was removed, and ``excess_bytes`` says how much that is.
    """

    def __init__(self, level: Level, capacity_bytes: int) -> None:
        self.level = level
        self._capacity_bytes = _checked(capacity_bytes)
        self._used: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._used_bytes = 0
        self._reserved_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """What the level may hold. Setting it below what is there is allowed."""
        return self._capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, value: int) -> None:
        self._capacity_bytes = _checked(value)

    @property
    def used_bytes(self) -> int:
        """Sum over the entries."""
        return self._used_bytes

    @property
    def reserved_bytes(self) -> int:
        """Sum over the reservations; 0 at rest."""
        return self._reserved_bytes

    @property
    def available_bytes(self) -> int:
        """What could be reserved now; never negative."""
        return max(0, self._capacity_bytes - self._used_bytes - self._reserved_bytes)

    @property
    def excess_bytes(self) -> int:
        """By how much a lowered capacity is exceeded; 0 otherwise."""
        return max(0, self._used_bytes + self._reserved_bytes - self._capacity_bytes)

    @property
    def used(self) -> Mapping[str, int]:
        """A read-only live view: key → bytes."""
        return MappingProxyType(self._used)

    @property
    def reservations(self) -> Mapping[str, int]:
        """A read-only live view: ingest id → bytes."""
        return MappingProxyType(self._reserved)

    def reserve(self, ingest_id: str, size_bytes: int) -> None:
        """Promises ``size_bytes`` to an ingest. Raises NoRoomError and changes nothing when they do not fit.

        The error's field ``fits`` is ``never`` when the level is too small even if empty, else ``later``.
        """
        if ingest_id in self._reserved:
            raise AccountingError(f"{self.level}: {ingest_id!r} has a reservation already")
        self._require_room(_checked(size_bytes))
        self._reserved[ingest_id] = size_bytes
        self._reserved_bytes += size_bytes

    def commit(self, ingest_id: str, key: str) -> None:
        """Turns a reservation into the entry ``key``."""
        if key in self._used:
            raise AccountingError(f"{self.level}: {key!r} is accounted for already")
        size_bytes = self.release(ingest_id)
        self._used[key] = size_bytes
        self._used_bytes += size_bytes

    def release(self, ingest_id: str) -> int:
        """Gives a reservation back; the bytes that it held."""
        if ingest_id not in self._reserved:
            raise AccountingError(f"{self.level}: {ingest_id!r} has no reservation")
        size_bytes = self._reserved.pop(ingest_id)
        self._reserved_bytes -= size_bytes
        return size_bytes

    def add(self, key: str, size_bytes: int) -> None:
        """Accounts for bytes that are there already (adoption at start). Raises NoRoomError as ``reserve`` does."""
        if key in self._used:
            raise AccountingError(f"{self.level}: {key!r} is accounted for already")
        self._require_room(_checked(size_bytes))
        self._used[key] = size_bytes
        self._used_bytes += size_bytes

    def remove(self, key: str) -> int:
        """Drops an entry; the bytes that it held."""
        if key not in self._used:
            raise AccountingError(f"{self.level}: {key!r} is not accounted for")
        size_bytes = self._used.pop(key)
        self._used_bytes -= size_bytes
        return size_bytes

    def move(self, old_key: str, new_key: str) -> None:
        """Renames an entry; its bytes stay used throughout (a blob that was withdrawn, say)."""
        if new_key in self._used:
            raise AccountingError(f"{self.level}: {new_key!r} is accounted for already")
        if old_key not in self._used:
            raise AccountingError(f"{self.level}: {old_key!r} is not accounted for")
        self._used[new_key] = self._used.pop(old_key)

    def resize(self, key: str, size_bytes: int) -> None:
        """Sets an entry's size, making it if it is new and dropping it at 0 (the pool).

        Growth may raise NoRoomError, as ``reserve`` does.
        """
        old_bytes = self._used.get(key, 0)
        if _checked(size_bytes) > old_bytes:
            self._require_room(size_bytes - old_bytes)
        if size_bytes:
            self._used[key] = size_bytes
        else:
            self._used.pop(key, None)
        self._used_bytes += size_bytes - old_bytes

    def check(self) -> None:
        """Raises AccountingError unless the running totals are the sums (invariant 2)."""
        used_bytes, reserved_bytes = sum(self._used.values()), sum(self._reserved.values())
        if (used_bytes, reserved_bytes) != (self._used_bytes, self._reserved_bytes):
            raise AccountingError(
                f"{self.level}: totals are {self._used_bytes} used and {self._reserved_bytes} reserved, "
                f"the entries sum to {used_bytes} and {reserved_bytes}"
            )

    def _require_room(self, size_bytes: int) -> None:
        available_bytes = self.available_bytes
        if size_bytes <= available_bytes:
            return
        never = size_bytes > self._capacity_bytes
        raise NoRoomError(
            f"{self.level} has no room for {format_size(size_bytes)}: "
            f"{format_size(available_bytes)} of {format_size(self._capacity_bytes)} are free",
            hint=(
                f"it can never fit: give {self.level} a capacity of at least {format_size(size_bytes)}"
                if never
                else "retry later, when leases have ended, or evict something"
            ),
            level=self.level,
            needed_bytes=size_bytes,
            available_bytes=available_bytes,
            capacity_bytes=self._capacity_bytes,
            fits="never" if never else "later",
        )


def _checked(size_bytes: int) -> int:
    if size_bytes < 0:
        raise AccountingError(f"a size cannot be negative: {size_bytes}")
    return size_bytes


@contextmanager
def whatever_fits(ledger: Ledger, size_bytes: int) -> Iterator[None]:
    """Lets the accounts take in what is really there, though it be more than the capacity."""
    capacity = ledger.capacity_bytes
    ledger.capacity_bytes = max(capacity, ledger.used_bytes + ledger.reserved_bytes + size_bytes)
    try:
        yield
    finally:
        ledger.capacity_bytes = capacity
