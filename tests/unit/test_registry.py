"""What the registry counts once must be what it would count now; and uses must not wait for a disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cached.cache.registry import Present, Registry
from cached.index import Index
from cached.level import Level
from cached.manifest import BlobRecord, FileEntry, Manifest
from cached.types import CheckedBy

SIZES = {"a" * 64: 10, "b" * 64: 20, "c" * 64: 5}


@pytest.fixture
def registry(tmp_path: Path):
    made = Registry(Index(tmp_path / "index"), lambda _: None)
    yield made
    asyncio.run(made.close())


def record(digest: str) -> BlobRecord:
    return BlobRecord(digest=digest, size_bytes=SIZES[digest], crc64=(1,))


def manifest(*digests: str) -> Manifest:
    files = tuple(
        FileEntry(f"{number}.bin", SIZES[digest], digest, CheckedBy.FIRST_SEEN) for number, digest in enumerate(digests)
    )
    return Manifest("m", "0123456789abcdef", "file:///m", files, 1.0)


def test_what_is_counted_once_is_what_is_there(registry: Registry) -> None:
    whole = manifest(*SIZES)
    first, second, third = SIZES

    def check() -> None:
        assert registry.present(whole) == Present.of(registry.blobs_of(whole))
        assert registry.present(whole) is registry.present(whole)

    for digest in SIZES:
        registry.landed(record(digest), Level.L2)
    registry.add_manifest(whole)
    check()
    assert registry.whole_at(whole, Level.L2)
    assert not registry.bytes_at(whole, Level.L1)
    for step in (
        lambda: registry.landed(record(first), Level.L1),
        lambda: registry.found(second, Level.L1),
        lambda: registry.landed(record(third), Level.L1),
        lambda: registry.landed(record(second), Level.L1),
        lambda: registry.doubt(first),
        lambda: registry.lost(third, Level.L1),
        lambda: registry.lost(third, Level.L2),
        lambda: registry.found(third, Level.L2),
        lambda: registry.quarantine(second, "damaged"),
        lambda: registry.mended(second),
    ):
        before = registry.changes
        step()
        assert registry.changes > before
        check()


def test_what_is_written_of_a_model_is_no_reason_to_count_again_where_it_is(registry: Registry) -> None:
    first, second, _ = SIZES
    whole = manifest(first)
    for digest in (first, second):
        registry.landed(record(digest), Level.L1)
    registry.add_manifest(whole)
    counted = registry.present(whole)
    registry.update(registry.models["m"], pinned=True)
    assert registry.present(whole) is counted
    registry.doubt(first)
    assert not registry.present(whole).confirmed_in_l1


def test_a_revision_that_has_other_content_is_counted_again_though_no_blob_moved(registry: Registry) -> None:
    first, second, _ = SIZES
    for digest in (first, second):
        registry.landed(record(digest), Level.L1)
    registry.add_manifest(manifest(first))
    assert registry.present(manifest(first)).l1_bytes == SIZES[first]
    registry.add_manifest(manifest(first, second))
    assert registry.present(manifest(first, second)).l1_bytes == SIZES[first] + SIZES[second]


def test_a_use_changes_nothing_and_is_written_later(registry: Registry, tmp_path: Path) -> None:
    model = registry.known("m")
    registry.update(model, source="file:///m")
    changes = registry.changes
    for number in range(3):
        registry.used(model, 100.0 + number, attaches=1)
    assert registry.changes == changes
    assert (model.record.attach_count, model.record.last_used_wall_s) == (3, 102.0)
    assert stored(tmp_path).attach_count == 0
    registry.write_uses()
    assert (stored(tmp_path).attach_count, stored(tmp_path).last_used_wall_s) == (3, 102.0)


def test_uses_are_written_at_the_end_and_not_of_a_forgotten_model(tmp_path: Path) -> None:
    registry = Registry(Index(tmp_path / "index"), lambda _: None)
    for name in ("m", "gone"):
        registry.update(registry.known(name), source="file:///m")
        registry.used(registry.known(name), 7.0, attaches=1)
    registry.forget_model(registry.known("gone"))
    asyncio.run(registry.close())
    reopened = Index(tmp_path / "index")
    assert {item.name: item.attach_count for item in reopened.models()} == {"m": 1}
    reopened.close()


def stored(tmp_path: Path):
    """What another process would read."""
    index = Index(tmp_path / "index")
    try:
        return next(record for record in index.models() if record.name == "m")
    finally:
        index.close()
