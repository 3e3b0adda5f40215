"""The host's trace: what is written is what `cached simulate` reads."""

from __future__ import annotations

import asyncio
import csv
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from cached.cache.events import EventBus
from cached.cache.failures import Failures
from cached.cache.trace import COLUMNS, TraceFiles, TraceLog
from cached.errors import LevelError
from cached.leases import Lease, LeaseTable
from cached.metrics import Metrics
from cached.simulate.trace import Row, read_trace
from cached.types import Attached, Client


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return 1.7e9 + self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s
        await asyncio.sleep(0)


class Host:
    """Leases on a folder's trace."""

    def __init__(self, folder: Path) -> None:
        self.time = Time()
        self.leases = LeaseTable()
        self.files = TraceFiles(folder)
        self.log = TraceLog(self.files, self.time)
        self.failures = Failures(EventBus(self.time), Metrics(), self.time)

    def attach(self, name: str, size_bytes: int = 100) -> Lease:
        now_s, wall_s = self.time.monotonic_s(), self.time.wall_s()
        lease = self.leases.open(name, "r1", Client(), now_s=now_s, wall_s=wall_s, size_bytes=size_bytes)
        self.log.opened(lease)
        return lease

    def release(self, lease: Lease) -> None:
        self.log.closed(self.leases.close(lease.lease_id))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def rows_of(attached: list[Attached]) -> list[Row]:
    return [Row(item.time_s, item.model, item.size_bytes, item.lease_s) for item in attached]


async def test_what_was_held_is_remembered_with_how_long(host: Host) -> None:
    first = host.attach('a, "quoted" and ünicode')
    host.time.now_s += 5.25
    second = host.attach("b", 200)
    host.time.now_s += 1.0
    host.release(second)
    await host.log.write()
    host.time.now_s += 1.0
    host.release(first)
    third = host.attach("c", 300)
    assert list(host.log.rows()) == [
        Attached(1_700_001_000.0, 'a, "quoted" and ünicode', 100, 7.25),
        Attached(1_700_001_005.25, "b", 200, 1.0),
        Attached(1_700_001_007.25, "c", 300, 0.0),
    ], "some are in the file, some wait to be, one is held still"
    host.release(third)
    assert len(list(host.log.rows())) == 3


async def test_the_files_are_traces_by_themselves(host: Host, tmp_path: Path) -> None:
    for name in ("a", "b, c"):
        host.release(host.attach(name))
        await host.log.write()
    assert read_trace(tmp_path / "trace.csv") == rows_of(list(Host(tmp_path).log.rows()))
    assert (tmp_path / "trace.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


async def test_it_is_written_by_itself_now_and_then(host: Host, tmp_path: Path) -> None:
    task = asyncio.create_task(host.log.run(host.failures))
    host.release(host.attach("a"))
    async with asyncio.timeout(30):
        while not host.files.read():
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(list(host.log.rows())) == 1


async def test_nothing_is_written_while_nothing_happens(host: Host, tmp_path: Path) -> None:
    await host.log.write()
    host.attach("held")
    host.release(host.attach("empty", 0))
    await host.log.write()
    assert list(tmp_path.iterdir()) == []
    assert [row.model for row in host.log.rows()] == ["held"]


def test_files_follow_each_other_and_are_bounded(tmp_path: Path) -> None:
    files = TraceFiles(tmp_path, rotate_bytes=2000)
    for at in range(1000):
        files.append([Attached(float(at), "model", 100, 1.0)])
    kept = [row.time_s for row in files.read()]
    assert kept == [float(at) for at in range(1000 - len(kept), 1000)], "the latest are kept, none between is missing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.1.csv", "trace.csv"]
    assert all(path.stat().st_size < 2100 for path in tmp_path.iterdir())
    assert len(read_trace(tmp_path / "trace.csv")) + len(read_trace(tmp_path / "trace.1.csv")) == len(kept)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text + "1700000002.0,c,30",
        lambda text: text + "nan,c,30,1\n",
        lambda text: text + "1,c,-30,1\n",
        lambda text: text + "1,c,30,-1\n",
        lambda text: text + "1,,30,1\n",
        lambda text: text + "1,\x1b[2J,30,1\n",
        lambda text: text + '1,"c,30,1\n',
        lambda text: text + "1,c,30,1,1\n",
        lambda text: text + "\0\0\0\0\n",
    ],
    ids=["torn", "nan", "no size", "negative", "no name", "not printable", "quote", "field too many", "zeros"],
)
def test_a_damaged_line_is_passed_over_and_told(
    tmp_path: Path, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    files = TraceFiles(tmp_path)
    files.append([Attached(1.0, "a", 10, 1.0)])
    path = tmp_path / "trace.csv"
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        files.append([Attached(2.0, "b", 20, 1.0)])
        assert [row.model for row in files.read()] == ["a", "b"]
    assert "trace.damaged_lines" in caplog.text + capsys.readouterr().out


async def test_what_the_disk_refuses_is_written_later(host: Host, tmp_path: Path) -> None:
    blocker = tmp_path / "trace.csv"
    blocker.mkdir()
    host.release(host.attach("a"))
    with pytest.raises(LevelError, match="the trace of 1 attaches could not be written: Is a directory"):
        await host.log.write()
    blocker.rmdir()
    host.release(host.attach("b"))
    await host.log.write()
    with (tmp_path / "trace.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["a", "b"]
