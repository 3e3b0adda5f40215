"""The index written behind the loop: in order, together, and never lost in silence."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from cached.cache.index_writer import IndexWriter
from cached.errors import LevelError
from cached.index import Index, ModelRecord


@pytest.fixture
def index(tmp_path: Path):
    made = Index(tmp_path / "index")
    yield made
    made.close()


def stored(tmp_path: Path) -> list[str]:
    """What another process would read."""
    other = Index(tmp_path / "index")
    try:
        return [record.name for record in other.models()]
    finally:
        other.close()


async def test_a_write_is_durable_once_it_was_waited_for(index: Index, tmp_path: Path) -> None:
    heard: list[Exception | None] = []
    writer = IndexWriter(index, heard.append)
    writer.start()
    index.put_model(ModelRecord(name="a"))
    assert [record.name for record in index.models()] == ["a"], "in memory at once"
    await writer.durable()
    assert stored(tmp_path) == ["a"]
    assert heard == [None]
    index.delete_model("a")
    index.put_model(ModelRecord(name="b"))
    await writer.stop()
    assert stored(tmp_path) == ["b"]
    index.put_model(ModelRecord(name="c"))
    assert stored(tmp_path) == ["b", "c"], "after the end each write waits again"
    await writer.stop()


async def test_what_changes_during_a_write_is_written_together_after_it(index: Index, monkeypatch) -> None:
    batches: list[list[str]] = []
    begun, go_on = threading.Event(), threading.Event()
    write = index.write

    def slow(unwritten):
        batches.append(sorted(unwritten))
        begun.set()
        go_on.wait(10)
        write(unwritten)

    monkeypatch.setattr(index, "write", slow)
    writer = IndexWriter(index, lambda _: None)
    writer.start()
    index.put_model(ModelRecord(name="a"))
    await asyncio.to_thread(begun.wait, 10)
    index.put_model(ModelRecord(name="a", source="file:///again"))
    index.put_model(ModelRecord(name="b"))
    durable = asyncio.ensure_future(writer.durable())
    await asyncio.sleep(0)
    assert not durable.done()
    go_on.set()
    await durable
    assert batches == [["model/a"], ["model/a", "model/b"]]
    assert not index.unwritten
    await writer.stop()


async def test_a_write_that_fails_is_told_and_tried_again_with_the_next(
    index: Index, tmp_path: Path, monkeypatch
) -> None:
    heard: list[Exception | None] = []
    writer = IndexWriter(index, heard.append)
    writer.start()
    with monkeypatch.context() as broken:
        broken.setattr("diskcache.Cache.set", _no_room)
        index.put_model(ModelRecord(name="a"))
        await writer.durable()
    assert len(heard) == 1
    assert "disk full" in str(heard[0])
    assert index.unwritten
    index.put_model(ModelRecord(name="b"))
    await writer.durable()
    assert heard[1:] == [None]
    assert stored(tmp_path) == ["a", "b"]
    await writer.stop()


async def test_a_disk_that_hangs_is_told_and_nobody_waits_for_it_any_more(
    index: Index, tmp_path: Path, monkeypatch
) -> None:
    heard: list[Exception | None] = []
    begun, go_on = threading.Event(), threading.Event()
    write = index.write

    def hang(unwritten):
        begun.set()
        go_on.wait(30)
        write(unwritten)

    monkeypatch.setattr(index, "write", hang)
    monkeypatch.setattr("cached.cache.index_writer.ANSWER_S", 0.1)
    writer = IndexWriter(index, heard.append)
    writer.start()
    index.put_model(ModelRecord(name="a"))
    await asyncio.to_thread(begun.wait, 10)
    async with asyncio.timeout(10):
        await asyncio.gather(writer.durable(), writer.durable())
        index.put_model(ModelRecord(name="b"))
        await writer.durable()
    assert len(heard) == 1
    assert isinstance(heard[0], LevelError)
    assert "has not answered for 0 s" in heard[0].message
    go_on.set()
    async with asyncio.timeout(10):
        while heard[-1] is not None:
            await asyncio.sleep(0.01)
    await writer.durable()
    assert stored(tmp_path) == ["a", "b"], "what was changed meanwhile is written, too"
    assert await writer.stop()


async def test_an_end_does_not_wait_for_a_disk_that_hangs(index: Index, monkeypatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hang(_unwritten):
        begun.set()
        go_on.wait(30)

    monkeypatch.setattr(index, "write", hang)
    monkeypatch.setattr("cached.cache.index_writer.ANSWER_S", 0.1)
    writer = IndexWriter(index, lambda _: None)
    writer.start()
    index.put_model(ModelRecord(name="a"))
    await asyncio.to_thread(begun.wait, 10)
    async with asyncio.timeout(10):
        assert not await writer.stop()
    go_on.set()


async def test_several_writes_in_one_transaction_are_one_change_and_an_undone_one_is_none(index: Index) -> None:
    writer = IndexWriter(index, lambda _: None)
    writer.start()
    with pytest.raises(RuntimeError), index.transact():
        index.put_model(ModelRecord(name="a"))
        raise RuntimeError
    assert not index.unwritten
    with index.transact():
        index.put_model(ModelRecord(name="a"))
        index.put_model(ModelRecord(name="b"))
    assert len(index.unwritten) == 2
    await writer.durable()
    assert not index.unwritten
    await writer.stop()


def _no_room(*_arguments: object, **_more: object) -> None:
    raise sqlite3.OperationalError("disk full")
