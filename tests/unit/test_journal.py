"""The journal of an ingest: what it keeps, and that nothing which happened to its file becomes a false word."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.errors import LevelError, NotFoundError
from cached.level import Level
from cached.levels.journal import IngestJournal, JournalState, read_journal
from cached.units import CHUNK_BYTES

KEY = "s3://bucket/model\0shard-1.safetensors\0version é\0"
SIZE = 5 * CHUNK_BYTES + 1
DIGEST = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def write_some(path: Path) -> None:
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
    journal.chunk(0, 0xA0, Level.L1)
    journal.chunk(0, 0xA0, Level.L2)
    journal.chunk(5, 2**64 - 1, Level.L1)
    journal.chunk(3, 0, Level.L2)
    journal.close()


def known(state: JournalState | IngestJournal | None) -> dict[int, tuple[int, str]]:
    assert state is not None
    return {index: (chunk.crc64, " ".join(sorted(chunk.levels))) for index, chunk in state.chunks.items()}


WRITTEN = {0: (0xA0, "l1 l2"), 5: (2**64 - 1, "l1"), 3: (0, "l2")}


def test_what_was_noted_is_read_again(path: Path) -> None:
    write_some(path)
    state = read_journal(path)
    assert known(state) == WRITTEN
    assert (state.source_key, state.size_bytes, state.landed_digest) == (KEY, SIZE, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_source_goes_on_where_it_was(path: Path) -> None:
    write_some(path)
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
    assert known(journal) == WRITTEN
    before = path.stat().st_size
    journal.chunk(0, 0xA0, Level.L1)
    assert path.stat().st_size == before, "what is known is not written again"
    journal.chunk(1, 7, Level.L1)
    journal.landed(DIGEST)
    journal.close()
    journal.close()
    state = read_journal(path)
    assert known(state) == WRITTEN | {1: (7, "l1")}
    assert state.landed_digest == journal.landed_digest == DIGEST


@pytest.mark.parametrize(("key", "size"), [(KEY + "2", SIZE), (KEY, SIZE + 1), ("", SIZE)])
def test_another_version_or_size_begins_anew(path: Path, key: str, size: int) -> None:
    write_some(path)
    journal = IngestJournal.open(path, source_key=key, size_bytes=size)
    assert journal.chunks == {}
    journal.chunk(2, 9, Level.L2)
    journal.close()
    state = read_journal(path)
    assert known(state) == {2: (9, "l2")}
    assert (state.source_key, state.size_bytes) == (key, size)


def test_a_chunk_with_another_checksum_is_only_where_it_was_seen_last(path: Path) -> None:
    write_some(path)
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
    journal.chunk(0, 0xB0, Level.L2)
    journal.close()
    assert known(read_journal(path))[0] == known(journal)[0] == (0xB0, "l2")


def test_a_torn_line_costs_itself_only(path: Path) -> None:
    write_some(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert known(read_journal(path)) == {index: WRITTEN[index] for index in (0, 5)}
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
    journal.chunk(4, 1, Level.L1)
    journal.close()
    assert known(read_journal(path)) == {index: WRITTEN[index] for index in (0, 5)} | {4: (1, "l1")}


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=40), flip=st.integers(0, 400))
def test_damage_never_becomes_a_false_word(tmp_path_factory: pytest.TempPathFactory, cut, garbage, flip) -> None:
    path = tmp_path_factory.mktemp("damage") / "journal"
    write_some(path)
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 0x10
    data[cut % len(data) : cut % len(data)] = garbage
    path.write_bytes(data)
    state = read_journal(path)
    if state is not None:
        assert (state.source_key, state.size_bytes) == (KEY, SIZE)
        for index, (crc64, levels) in known(state).items():
            assert WRITTEN[index][0] == crc64
            assert set(levels.split()) <= set(WRITTEN[index][1].split())
    IngestJournal.open(path, source_key=KEY, size_bytes=SIZE).close()


@pytest.mark.parametrize("data", [b"", b"\n", b"garbage\n", b"\xff" * 5000, b"{} 00000000\n"])
def test_a_file_that_is_no_journal_is_begun_anew(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert read_journal(path) is None
    write_some(path)
    assert known(read_journal(path)) == WRITTEN


def test_a_chunk_beyond_the_blob_is_ignored(path: Path) -> None:
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=CHUNK_BYTES)
    journal.chunk(0, 1, Level.L1)
    journal.chunk(1, 1, Level.L1)
    journal.close()
    assert known(read_journal(path)) == {0: (1, "l1")}


def test_a_deleted_journal_is_gone(path: Path) -> None:
    journal = IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
    journal.delete()
    journal.delete()
    assert not path.exists()
    assert read_journal(path) is None


def test_a_journal_without_its_folder_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        IngestJournal.open(tmp_path / "no" / "journal", source_key=KEY, size_bytes=SIZE)


@pytest.mark.parametrize("plant", [lambda path: os.symlink("/etc/hostname", path), os.mkfifo, os.mkdir])
def test_what_was_planted_is_refused(path: Path, plant) -> None:
    plant(path)
    with pytest.raises(LevelError):
        read_journal(path)
    with pytest.raises(LevelError):
        IngestJournal.open(path, source_key=KEY, size_bytes=SIZE)
