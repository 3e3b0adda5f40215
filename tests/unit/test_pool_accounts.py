"""L1's accounts while memory of the pool is made to fit what is to come."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cached.cache.storage import Storage
from cached.config import load_config
from cached.errors import NoRoomError
from cached.level import Level
from cached.levels.shm import SHM_FOLDER, ShmLevel
from cached.manifest import BlobRecord

MIB = 1024 * 1024
CAPACITY_BYTES = 64 * MIB


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[Storage]:
    instance = secrets.token_hex(6)
    overrides = {
        "daemon.state_dir": str(tmp_path), "l1.capacity": f"{CAPACITY_BYTES}B", "l1.memory_reserve_bytes": "0B",
    }  # fmt: skip
    made = Storage(load_config(None, {}, overrides).config, ShmLevel(instance), None)
    await made.scan(Level.L1)
    yield made
    made.check()
    for name in os.listdir(SHM_FOLDER):
        if name.startswith(f"cached.{instance}."):
            os.unlink(os.path.join(SHM_FOLDER, name))


async def pooled(storage: Storage, *sizes_bytes: int) -> None:
    for size_bytes in sizes_bytes:
        ref = storage.l1.grow_pool(size_bytes)
        Path(ref.path).write_bytes(bytes(size_bytes))
        assert storage.l1.mark_clean(ref)
    await storage.collect()
    assert storage.pool_bytes(Level.L1) == sum(sizes_bytes)


async def test_what_is_cut_off_is_free_and_what_is_left_becomes_the_ingest(storage: Storage) -> None:
    await pooled(storage, 40 * MIB, 8 * MIB)
    sizes = {"a": 30 * MIB, "b": 2 * MIB}
    ledger = storage.ledger(Level.L1)
    await storage.fit_pool(sizes)
    assert storage.pool_bytes(Level.L1) == ledger.used_bytes == 32 * MIB
    assert storage.missing_bytes(Level.L1, {"c": CAPACITY_BYTES}) == 0
    await storage.open(Level.L1, sizes)
    assert (storage.pool_bytes(Level.L1), ledger.used_bytes, ledger.reserved_bytes) == (0, 0, 32 * MIB)
    for ingest_id, size_bytes in sizes.items():
        status = os.stat(storage.l1.ingest(ingest_id).path)
        assert status.st_size == status.st_blocks * 512 == size_bytes, "its pages are those of the pool"
        storage.discard(Level.L1, ingest_id)
    await storage.collect()


async def test_what_cannot_be_opened_leaves_its_memory_in_the_pool(storage: Storage) -> None:
    await pooled(storage, 40 * MIB)
    sizes = {"a": 30 * MIB, "b": CAPACITY_BYTES}
    await storage.fit_pool(sizes)
    with pytest.raises(NoRoomError):
        await storage.open(Level.L1, sizes)
    await storage.collect()
    assert storage.pool_bytes(Level.L1) == storage.ledger(Level.L1).used_bytes
    assert storage.l1.drop_pool(CAPACITY_BYTES) + storage.l1.pool_bytes <= 40 * MIB
    await storage.collect()


async def test_a_cancelled_cut_ends_before_anybody_else_gets_the_memory(storage: Storage) -> None:
    await pooled(storage, 40 * MIB)
    cutting = asyncio.create_task(storage.fit_pool({"a": 30 * MIB}))
    await asyncio.sleep(0)  # its thread has begun, or is about to
    cutting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cutting
    assert storage.l1.pool_sizes() == [30 * MIB]
    assert storage.pool_bytes(Level.L1) == storage.ledger(Level.L1).used_bytes == 30 * MIB
    await storage.fit_pool({"b": 30 * MIB})
    await storage.open(Level.L1, {"b": 30 * MIB})
    assert storage.l1.pool_bytes == 0
    storage.discard(Level.L1, "b")
    await storage.collect()


async def test_a_part_counts_for_its_pages_and_never_takes_or_becomes_a_segment_of_the_pool(storage: Storage) -> None:
    await pooled(storage, 8 * MIB)
    ledger, length_bytes = storage.ledger(Level.L1), 200 * MIB
    await storage.open(Level.L1, {"a": 2 * MIB}, {"a": length_bytes})
    assert (ledger.reserved_bytes, storage.pool_bytes(Level.L1)) == (2 * MIB, 8 * MIB)
    with open(storage.l1.ingest("a").path, "r+b") as file:
        file.seek(100 * MIB)
        file.write(bytes(MIB))
    storage.suspend(Level.L1, "a", sparse=True)
    assert (ledger.reserved_bytes, storage.kept_bytes(Level.L1, "a")) == (0, MIB)
    assert storage.missing_bytes(Level.L1, {"a": CAPACITY_BYTES}) == 0
    await storage.open(Level.L1, {"a": 3 * MIB}, {"a": length_bytes})
    assert storage.is_resumed(Level.L1, "a")
    assert (ledger.reserved_bytes, storage.l1.ingest("a").size_bytes) == (3 * MIB, length_bytes)
    with open(storage.l1.ingest("a").path, "rb"):
        storage.discard(Level.L1, "a")
        assert storage.withdrawn_bytes(Level.L1) == MIB
        await storage.collect()
        assert storage.withdrawn_bytes(Level.L1) == MIB, "somebody has it open"
    await storage.collect()
    assert (storage.withdrawn_bytes(Level.L1), storage.pool_bytes(Level.L1)) == (0, 8 * MIB)


async def test_what_an_earlier_daemon_left_of_a_part_counts_for_its_pages(storage: Storage) -> None:
    await storage.open(Level.L1, {"a": MIB}, {"a": 300 * MIB})
    with open(storage.l1.ingest("a").path, "r+b") as file:
        file.write(bytes(MIB // 2))
    storage.suspend(Level.L1, "a")
    later = Storage(load_config(None, {}, {"l1.capacity": "1MiB"}).config, ShmLevel(storage.l1.instance), None)
    assert (await later.scan(Level.L1)).ingests == {"a": 300 * MIB}
    later.keep_ingest(Level.L1, "a", 300 * MIB, sparse=True)
    assert later.kept_bytes(Level.L1, "a") == MIB // 2
    later.check()


def test_a_second_copy_that_somebody_maps_is_withdrawn_and_not_expected_to_be_free_soon(storage: Storage) -> None:
    level, digest = storage.l1, "0" * 64
    for ingest_id in ("a", "b"):
        level.create(ingest_id, MIB)
    with open(level.ingest("b").path, "rb"):
        level.commit("a", digest)
        level.commit("b", digest)
        level.collect()
        assert level.withdrawn_bytes == MIB
        assert not level.leaving_sizes
    level.collect()
    assert not level.withdrawn_bytes
    level.remove(digest)
    assert list(level.leaving_sizes.values()) == [MIB]
    level.collect()


def test_what_is_held_beside_the_budget_adds_up_and_stays_within_its_allowance(storage: Storage) -> None:
    storage.refresh_capacities()
    allowed_bytes = storage.transient_room_bytes(Level.L1)
    assert allowed_bytes == CAPACITY_BYTES // 4
    storage.hold_beside("m", "r", 6 * MIB)
    storage.hold_beside("m", "r", 36)  # the rest of it
    assert storage.transient_bytes == 6 * MIB + 36
    assert storage.transient_room_bytes(Level.L1) == allowed_bytes - 6 * MIB - 36
    ledger = storage.ledger(Level.L1)
    ledger.reserve("r", CAPACITY_BYTES + 6 * MIB)
    storage.count_again("m", "r")
    assert storage.transient_bytes == 0
    assert storage.transient_room_bytes(Level.L1) == allowed_bytes - 6 * MIB, "it is beside the budget as before"
    ledger.release("r")
    assert storage.transient_room_bytes(Level.L1) == allowed_bytes


async def test_memory_that_was_let_in_beside_the_budget_is_not_kept_for_the_next_blob(storage: Storage) -> None:
    await pooled(storage, CAPACITY_BYTES - MIB)
    storage.hold_beside("m", "r", 8 * MIB)
    await storage.open(Level.L1, {"a": 8 * MIB})
    await storage.commit(Level.L1, "a", BlobRecord("0" * 64, 8 * MIB, (0,)))
    storage.withdraw("0" * 64)
    storage.left_beside("m", "r")
    ledger = storage.ledger(Level.L1)
    assert ledger.capacity_bytes == CAPACITY_BYTES + 8 * MIB, "until nobody maps it"
    await storage.collect()
    assert ledger.used_bytes <= ledger.capacity_bytes == CAPACITY_BYTES
    assert storage.l1.pool_bytes <= CAPACITY_BYTES
