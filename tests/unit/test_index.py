from __future__ import annotations

import os
import pickle
import random
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import diskcache
import pytest

from cached.errors import LevelError
from cached.index import Index, ModelRecord, PartFile, PartRecord, PendingPull, TimedPull
from cached.index.records import PARTS
from cached.index.store import Store
from cached.level import Level
from cached.manifest import BlobRecord, FileEntry, Manifest
from cached.types import CheckedBy, Tier
from cached.units import CHUNK_BYTES

A, B = "a" * 64, "b" * 64
MODEL = ModelRecord(
    name="llama",
    source="s3://bucket/llama",
    origin_options={"endpoint": "http://localhost:1"},
    operator_tier=Tier.HOT,
    pinned=True,
    current_revision="abcd",
    last_used_wall_s=12.25,
    attach_count=3,
    last_error="no",
)
MANIFEST = Manifest(
    name="llama",
    revision="abcd",
    source="s3://bucket/llama",
    files=(FileEntry("model.safetensors", CHUNK_BYTES + 1, A, CheckedBy.FIRST_SEEN),),
    created_time_s=1.5,
)
BLOB = BlobRecord(A, CHUNK_BYTES + 1, (1, (1 << 64) - 1))
PULL = PendingPull("llama", "abcd", "s3://bucket/llama", Level.L1, ("0123",))


def fill(index: Index) -> None:
    index.put_model(MODEL)
    index.put_manifest(MANIFEST)
    index.put_blob(BLOB)
    index.put_pending(PULL)


def content(index: Index) -> tuple[list[Any], ...]:
    return index.models(), index.manifests(), index.blobs(), index.pending()


FULL = ([MODEL], [MANIFEST], [BLOB], [PULL])
EMPTY: tuple[list[Any], ...] = ([], [], [], [])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index"


def aside(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other != path)


def sql(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path / "cache.db", isolation_level=None)) as connection:
        connection.execute(statement, values)


def test_round_trip_over_restarts(path: Path) -> None:
    with closing(Index(path)) as index:
        fill(index)
        index.put_model(ModelRecord("other"))
        index.put_pending(PendingPull("other", "", "file:///x", Level.L2))
        index.delete_model("other")
        index.delete_model("never known")
        index.delete_pending("other", "")
        assert content(index) == FULL
    with closing(Index(path)) as index:
        assert content(index) == FULL
        assert index.warnings == []
        index.delete_manifest("llama", "abcd")
        index.delete_blob(A)
        index.delete_pending("llama", "abcd")
        index.delete_model("llama")
    with closing(Index(path)) as index:
        assert content(index) == EMPTY
    assert aside(path) == []
    assert path.stat().st_mode & 0o077 == 0


def test_a_write_is_durable_when_it_returns(path: Path) -> None:
    """Another connection sees it at once, and every commit is synced in full."""
    with closing(Index(path)) as index:
        fill(index)
        with closing(sqlite3.connect(path / "cache.db")) as other:
            assert other.execute("SELECT count(*) FROM Cache").fetchone() == (5,)
            settings = dict(other.execute("SELECT key, value FROM Settings"))
    assert settings["sqlite_synchronous"] == 2
    assert (settings["eviction_policy"], settings["cull_limit"]) == ("none", 0)


def test_big_values_stay_in_the_database(path: Path) -> None:
    size = 2000 * CHUNK_BYTES
    big = BlobRecord(B, size, tuple(range(2000)))
    with closing(Index(path)) as index:
        index.put_blob(big)
    assert {item.name.split("-")[0] for item in path.iterdir()} == {"cache.db"}
    with closing(Index(path)) as index:
        assert index.blobs() == [big]


def test_little_of_it_stays_in_memory_even_where_the_file_says_otherwise(path: Path) -> None:
    with diskcache.Cache(str(path), sqlite_cache_size=8192):
        pass
    with closing(Store(path)) as store:
        assert list(store._cache._sql("PRAGMA cache_size")) == [(256,)]


def test_a_transaction_counts_as_a_whole_or_not_at_all(path: Path) -> None:
    class StopError(Exception):
        pass

    with closing(Index(path)) as index:
        index.put_model(MODEL)
        with pytest.raises(StopError), index.transact():
            index.put_blob(BLOB)
            index.put_model(ModelRecord("llama"))
            index.delete_model("llama")
            with index.transact():
                index.put_pending(PULL)
            raise StopError
        assert content(index) == ([MODEL], [], [], [])
        with index.transact():
            index.put_blob(BLOB)
            index.put_manifest(MANIFEST)
            assert index.blobs() == [BLOB]
            index.put_pending(PULL)
    with closing(Index(path)) as index:
        assert content(index) == FULL


@pytest.mark.parametrize("damage", [b"this is no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_an_unreadable_database_is_set_aside(path: Path, damage: bytes) -> None:
    with closing(Index(path)) as index:
        fill(index)
    for leftover in path.iterdir():
        leftover.unlink()
    (path / "cache.db").write_bytes(damage)
    with closing(Index(path)) as index:
        assert content(index) == EMPTY
        assert "set aside" in index.warnings[0]
        fill(index)
    (name,) = aside(path)
    assert name.startswith("index.corrupt-")
    assert (path.parent / name / "cache.db").read_bytes() == damage
    with closing(Index(path)) as index:
        assert (content(index), index.warnings) == (FULL, [])


def test_a_database_with_damaged_pages_is_set_aside_or_still_right(path: Path) -> None:
    with closing(Index(path)) as index:
        fill(index)
        for number in range(50):
            index.put_model(ModelRecord(f"model-{number}", last_error="x" * 500))
    database = path / "cache.db"
    good = database.read_bytes()
    for page in range(len(good) // 4096):
        damaged = bytearray(good)
        damaged[page * 4096 + 5 : page * 4096 + 1000] = random.Random(page).randbytes(995)
        database.write_bytes(damaged)
        with closing(Index(path)) as index:
            found = {record.name: record for record in index.models()}
            assert found.get("llama") in (None, MODEL)
            assert bool(index.warnings) == (len(found) != 51)
        for leftover in path.iterdir():
            leftover.unlink()


def test_set_aside_twice_in_one_second_keeps_both(path: Path) -> None:
    for _ in range(3):
        path.mkdir(parents=True, exist_ok=True)
        (path / "cache.db").write_bytes(b"junk" * 100)
        Index(path).close()
        for leftover in path.iterdir():
            leftover.unlink()
    assert len(aside(path)) == 3


def test_a_newer_format_is_set_aside(path: Path) -> None:
    with closing(Index(path)) as index:
        fill(index)
    sql(path, "UPDATE Cache SET value = ? WHERE key = 'format'", f"{zlib.crc32(b'2'):08x}:2")
    with closing(Index(path)) as index:
        assert content(index) == EMPTY
        assert "format 2" in index.warnings[0]
    assert aside(path)[0].startswith("index.format-2-")


def test_another_programs_cache_is_set_aside(path: Path) -> None:
    with diskcache.Cache(str(path)) as cache:
        cache["something"] = "else"
    with closing(Index(path)) as index:
        assert content(index) == EMPTY
    assert aside(path)[0].startswith("index.corrupt-")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE Cache SET value = replace(value, '12.25', '12.26') WHERE key = 'model/llama'",
        "UPDATE Cache SET value = 'junk' WHERE key = 'model/llama'",
        "UPDATE Cache SET value = 7 WHERE key = 'model/llama'",
        "UPDATE Cache SET value = NULL WHERE key = 'model/llama'",
        "UPDATE Cache SET key = 'model/other' WHERE key = 'model/llama'",
        "UPDATE Cache SET key = 'unknown/llama' WHERE key = 'model/llama'",
        "UPDATE Cache SET mode = 3, filename = '../../x', value = NULL WHERE key = 'model/llama'",
    ],
)
def test_a_damaged_entry_is_forgotten_and_the_rest_kept(path: Path, change: str) -> None:
    with closing(Index(path)) as index:
        fill(index)
    precious = path.parent.parent / "x"
    precious.write_text("kept")
    sql(path, change)
    with closing(Index(path)) as index:
        assert content(index) == ([], *FULL[1:])
        assert len(index.warnings) == 1
    with closing(Index(path)) as index:
        assert (content(index), index.warnings) == (([], *FULL[1:]), [])
    assert aside(path) == []
    assert precious.read_text() == "kept"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


def test_pickles_are_never_loaded(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    with closing(Index(path)) as index:
        fill(index)
    sql(path, "UPDATE Cache SET mode = 4, value = ? WHERE key = 'model/llama'", bomb)
    with closing(Index(path)) as index:
        assert content(index) == ([], *FULL[1:])
    sql(path, "INSERT INTO Cache(key, raw, mode, value) VALUES (?, 0, 4, ?)", bomb, bomb)
    with closing(Index(path)) as index:
        assert content(index) == EMPTY
    assert aside(path)[0].startswith("index.corrupt-")
    assert not (tmp_path / "exploded").exists()


def test_a_value_that_json_cannot_hold_changes_nothing(path: Path) -> None:
    with closing(Index(path)) as index:
        with pytest.raises(ValueError, match="JSON"):
            index.put_model(ModelRecord("llama", last_used_wall_s=float("nan")))
        assert content(index) == EMPTY


def test_a_full_disk_is_a_level_error_and_is_made_good_later(path: Path) -> None:
    """SQLite's own page limit stands in for a full file system: the same code, SQLITE_FULL."""
    with closing(Index(path)) as index:
        fill(index)
        connection = index._store._cache._con
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        big = ModelRecord("big", last_error="x" * 100_000)
        with pytest.raises(LevelError) as full:
            index.put_model(big)
        assert full.value.fields["path"] == str(path)
        assert "full" in full.value.fields["cause"]
        assert index.models() == [big, MODEL]
        with closing(sqlite3.connect(path / "cache.db")) as other:
            assert other.execute("SELECT count(*) FROM Cache").fetchone() == (5,)
        index.flush()
    with closing(Index(path)) as index:
        assert index.models() == [big, MODEL]


def test_a_locked_database_is_a_level_error_and_is_made_good_later(path: Path) -> None:
    with closing(Index(path)) as index:
        fill(index)
        with closing(sqlite3.connect(path / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LevelError), index.transact():
                index.delete_blob(A)
                index.delete_manifest("llama", "abcd")
            other.execute("ROLLBACK")
        assert content(index) == ([MODEL], [], [], [PULL])
        index.put_model(MODEL)
    with closing(Index(path)) as index:
        assert content(index) == ([MODEL], [], [], [PULL])


def test_a_folder_that_cannot_be_is_a_level_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LevelError) as error:
        Index(tmp_path / "file" / "index")
    assert error.value.fields["path"] == str(tmp_path / "file" / "index")
    (tmp_path / "index" / "cache.db").mkdir(parents=True)
    with pytest.raises(LevelError):
        Index(tmp_path / "index")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "index"]


def test_timed_pulls_come_in_the_order_of_their_times(path: Path) -> None:
    later, sooner, other = (
        TimedPull("m", "s3://b/m", 30.0, "s3://b/m", Level.L2, Tier.WARM),
        TimedPull("m", "m@abcd", 20.0),
        TimedPull("n", "n", 25.0),
    )
    with closing(Index(path)) as index:
        for pull in (later, sooner, other):
            index.put_timed(pull)
    with closing(Index(path)) as index:
        assert index.timed() == [sooner, other, later]
        assert index.timed("m") == [sooner, later]
        index.put_timed(TimedPull("m", "m", 30.0, level=Level.L2))
        assert [pull.level for pull in index.timed("m")] == [Level.L1, Level.L2]
        index.delete_timed(sooner)
        index.delete_timed(sooner)
        assert index.timed("m") == [TimedPull("m", "m", 30.0, level=Level.L2)]


@pytest.mark.parametrize(("old", "new"), [('"l1"', '"l3x"'), ('"ref":"m"', '"ref":"../m"'), ('"hot"', '"hotter"')])
def test_a_timed_pull_that_makes_no_sense_is_forgotten(path: Path, old: str, new: str) -> None:
    with closing(Index(path)) as index:
        index.put_timed(TimedPull("m", "m", 30.0, tier=Tier.HOT))
    with closing(sqlite3.connect(path / "cache.db", isolation_level=None)) as connection:
        ((sealed,),) = connection.execute("SELECT value FROM Cache WHERE key LIKE 'timed/%'").fetchall()
        text = sealed.partition(":")[2].replace(old, new)
        connection.execute(
            "UPDATE Cache SET value = ? WHERE key LIKE 'timed/%'", (f"{zlib.crc32(text.encode()):08x}:{text}",)
        )
    with closing(Index(path)) as index:
        assert index.timed() == []
        assert "timed/m/30.000" in index.warnings[0]


def test_what_is_here_of_parts_is_known_over_restarts_until_it_is_forgotten(path: Path) -> None:
    files = (PartFile("a.safetensors", 7, "etag", A, "0123"), PartFile("b.safetensors", 5, "", "", "4567"))
    options = {"endpoint_url": "http://store:9000"}
    parts = [PartRecord("llama", "abcd", "s3://bucket/llama", files, options), PartRecord("other", "ef", "", files[:1])]
    assert (parts[0].total_bytes, parts[0].ingests) == (12, {"0123", "4567"})
    with closing(Index(path)) as index:
        for part in parts:
            index.put_part(part)
    with closing(Index(path)) as index:
        assert (index.parts(), index.parts("other"), index.warnings) == (parts, parts[1:], [])
        index.delete_part("llama", "abcd")
        index.delete_part("llama", "of which nothing is known")
    with closing(Index(path)) as index:
        assert index.parts() == parts[1:]


def test_a_record_of_a_part_that_an_earlier_version_wrote_has_no_options() -> None:
    part = PartRecord("llama", "abcd", "s3://bucket/llama", (PartFile("a.safetensors", 7, "etag", A, "0123"),))
    written = {name: value for name, value in PARTS.to_dict(part).items() if name != "origin_options"}
    assert PARTS.from_dict(written) == part
