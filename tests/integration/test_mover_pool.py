"""The life of real mover processes: started, stopped, killed, hung, replaced, ended."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cached.errors import (
    MoverError,
    UnavailableError,
)
from cached.transfer import process
from cached.transfer.jobs import (
    Checksum,
    Copy,
    Fetch,
    Hash,
    Hashed,
)
from cached.units import CHUNK_BYTES, MIB
from tests.integration.mover_support import (
    DEADLINE_S,
    Files,
    MovableClock,
    assert_moved,
    content_of,
    pool_of,
    read,
    temporary_files,
    until,
)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    with temporary_files(tmp_path) as made:
        yield made


async def test_work_of_a_killed_mover_is_done_by_another(files: Files) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    heard: list[int] = []
    async with pool_of(movers=1, threads=4, on_death=heard.append) as pool:
        await pool.run(Checksum(source, 0, MIB))
        first = pool.pids[0]
        os.kill(first, signal.SIGSTOP)
        running = [asyncio.create_task(pool.run(Checksum(source, 0, MIB))) for _ in range(6)]
        await until(lambda: pool.in_flight == 4, "handed over")
        os.kill(first, signal.SIGKILL)
        for result in await asyncio.gather(*running):
            assert_moved(result, content)
        assert first not in pool.pids
        assert pool.restarts == len(heard) == 1


async def test_what_is_given_to_a_dead_mover_whose_end_was_not_seen_yet_is_done_by_another(files: Files) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    async with pool_of(movers=1, threads=4) as pool:
        await pool.run(Checksum(source, 0, MIB))
        (first,) = pool.pids
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        tickets = [pool.submit(Checksum(source, 0, MIB))]
        await asyncio.sleep(0)  # enough for the loop to close the pipe that broke
        tickets += [pool.submit(Checksum(source, 0, MIB)) for _ in range(3)]
        assert pool.pids == (first,)
        for ticket in tickets:
            assert_moved(await ticket.future, content)
        assert first not in pool.pids
        assert pool.restarts == 1


async def test_a_job_that_outlives_three_movers_is_given_up(files: Files, tmp_path, monkeypatch) -> None:
    source = files.memory(MIB, content_of(MIB))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho '{\"ready\": true}'\nread -r job\nkill -KILL $$\n")
    fake.chmod(0o755)
    async with pool_of(movers=1, threads=1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(fake))
            with pytest.raises(MoverError, match=r"Checksum was lost.*killed by signal 9") as caught:
                await pool.run(Checksum(source, 0, MIB))
        assert caught.value.retryable
        assert pool.restarts == 3
        assert_moved(await pool.run(Checksum(source, 0, MIB)), read(source))


async def test_a_mover_that_hangs_is_replaced(files: Files) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    clock = MovableClock()
    async with pool_of(movers=1, threads=1, clock=clock) as pool:
        await pool.run(Checksum(source, 0, MIB))
        hanging = pool.pids[0]
        os.kill(hanging, signal.SIGSTOP)
        running = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        await until(lambda: pool.in_flight == 1, "handed over")
        clock.ahead_s = 400.0
        assert_moved(await running, content)
        assert hanging not in pool.pids
        assert pool.restarts == 1


async def test_what_comes_slowly_from_an_origin_is_not_taken_for_what_hangs(files: Files) -> None:
    """A range's share of a slow link may be a few kilobytes a second; one that is silent ends by its own timeout."""
    content = content_of(MIB)
    item = files.object("slow", content)
    clock = MovableClock()
    async with pool_of(movers=1, threads=1, clock=clock) as pool:
        await pool.run(Checksum(files.memory(MIB, content), 0, MIB))
        slow = pool.pids[0]
        os.kill(slow, signal.SIGSTOP)
        running = asyncio.create_task(pool.run(Fetch(files.spec, item, 0, MIB, files.memory(MIB))))
        await until(lambda: pool.in_flight == 1, "handed over")
        clock.ahead_s = 400.0  # of 300 s, and 1 MiB at 10 kB/s
        await asyncio.sleep(2.5)  # looked at twice
        os.kill(slow, signal.SIGCONT)
        assert_moved(await running, content)
        assert pool.restarts == 0


async def test_the_niceness_of_movers_is_absolute_and_of_all_their_threads(files: Files) -> None:
    """A daemon that the service manager gives priority gives none to what moves bytes."""
    content = content_of(MIB)
    async with pool_of(movers=1, threads=2, nice=os.nice(0) + 7) as pool:
        await pool.run(Copy(files.memory(MIB, content), files.memory(MIB), 0, MIB))
        process = Path(f"/proc/{pool.pids[0]}")
        niced = {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in (process / "task").iterdir()}
        assert niced == {os.nice(0) + 7}
        assert os.getsid(pool.pids[0]) == pool.pids[0]
        if (process / "autogroup").exists():
            await until(
                lambda: (process / "autogroup").read_text().endswith(f" nice {os.nice(0) + 7}\n"), "the session"
            )


async def test_a_mover_that_was_killed_and_cannot_be_ended_gives_its_jobs_back(files: Files, monkeypatch) -> None:
    content = content_of(MIB)
    source, target = files.memory(MIB, content), files.memory(MIB)
    clock, heard = MovableClock(), []
    monkeypatch.setattr(process, "UNKILLABLE_S", 0.1)
    async with pool_of(movers=1, threads=1, clock=clock, on_lost=lambda *told: heard.append(told)) as pool:
        await pool.run(Checksum(source, 0, MIB))
        stuck = pool.pids[0]
        os.kill(stuck, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "kill", lambda _popen: None)  # as in the kernel, where no signal arrives
            running = asyncio.create_task(pool.run(Copy(source, target, 0, MIB)))
            await until(lambda: pool.in_flight == 1, "handed over")
            clock.ahead_s = 400.0
            with pytest.raises(MoverError, match=r"Copy was lost.*cannot be ended: it waits for a disk that hangs"):
                await running
        assert pool.restarts == 1
        assert not await pool.settled(target.path), "it may still write there"
        assert await pool.settled(source.path)
        assert_moved(await pool.run(Checksum(source, 0, MIB)), content)
        [(paths, gone)] = heard
        assert paths == {source.path, target.path}
        os.kill(stuck, signal.SIGKILL)
        await until(gone.done, "it to end after all")
        await asyncio.sleep(0)
        assert await pool.settled(target.path)


async def test_movers_are_started_on_demand_and_ended_when_idle(files: Files) -> None:
    source = files.memory(CHUNK_BYTES, content_of(CHUNK_BYTES))
    clock = MovableClock()
    async with pool_of(movers=2, threads=1, idle_timeout_s=30.0, clock=clock) as pool:
        assert (pool.active_movers, pool.capacity) == (0, 2)
        await pool.run(Checksum(source, 0, CHUNK_BYTES))
        assert pool.active_movers == 1
        await asyncio.gather(*(pool.run(Checksum(source, 0, CHUNK_BYTES)) for _ in range(20)))
        assert pool.active_movers == 2
        clock.ahead_s = 31.0
        await until(lambda: pool.pids == (), "ended")
        assert pool.restarts == 0
        await pool.run(Checksum(source, 0, 1))
        assert pool.active_movers == 1


async def test_a_mover_with_a_hash_under_way_is_kept_longer(files: Files) -> None:
    source = files.memory(2 * MIB, content_of(2 * MIB))
    clock = MovableClock()
    async with pool_of(movers=1, threads=1, idle_timeout_s=1.0, clock=clock) as pool:
        await pool.run(Hash("a", source, 0, MIB, False), key="a")
        pids = pool.pids
        clock.ahead_s = 5.0
        readings = clock.readings
        await until(lambda: clock.readings >= readings + 2, "looked after twice")
        assert pool.pids == pids
        result = await pool.run(Hash("a", source, MIB, MIB, True), key="a")
        assert isinstance(result, Hashed)
        assert result.sha256 == hashlib.sha256(read(source)).hexdigest()


async def test_what_is_urgent_goes_first(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    order: list[str] = []
    async with pool_of(movers=1, threads=1) as pool:

        async def one(name: str, priority: int) -> None:
            await pool.run(Checksum(source, 0, MIB), priority=priority)
            order.append(name)

        await asyncio.gather(one("a", 5), one("b", 5), one("c", 0), one("d", -1), one("e", 0))
    assert order == ["d", "c", "e", "a", "b"]


async def test_cancelled_jobs_leave_the_queue_and_their_late_answers_are_dropped(files: Files) -> None:
    content = content_of(MIB)
    source, target = files.memory(MIB, content), files.memory(MIB)
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        flying = asyncio.create_task(pool.run(Copy(source, target, 0, MIB)))
        queued = asyncio.create_task(pool.run(Copy(source, target, 0, MIB)))
        await until(lambda: pool.in_flight == 1 and pool.waiting == 1, "one in flight, one queued")
        for task in (queued, flying):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (pool.in_flight, pool.waiting) == (1, 0)
        settled = asyncio.create_task(pool.settled(target.path))
        await pool.settled(source.path)
        await asyncio.sleep(0)
        assert not settled.done()
        os.kill(pool.pids[0], signal.SIGCONT)
        await settled
        assert pool.in_flight == 0
        assert read(target) == content
        assert_moved(await pool.run(Checksum(source, 0, MIB)), content)
        assert pool.restarts == 0


async def test_closing_refuses_what_waits_and_ends_what_hangs(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        os.kill(pool.pids[0], signal.SIGSTOP)
        flying = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        queued = asyncio.create_task(pool.run(Checksum(source, 0, MIB)))
        await until(lambda: pool.in_flight == 1 and pool.waiting == 1, "one in flight, one queued")
        await pool.close(0.1)
        with pytest.raises(UnavailableError):
            await queued
        with pytest.raises(MoverError):
            await flying
        with pytest.raises(UnavailableError):
            await pool.run(Checksum(source, 0, MIB))
        assert (pool.pids, pool.restarts) == ((), 0)


async def test_closing_lets_movers_finish(files: Files) -> None:
    content = content_of(CHUNK_BYTES)
    source = files.memory(CHUNK_BYTES, content)
    async with pool_of(movers=1, threads=2) as pool:
        await pool.run(Checksum(source, 0, 1))
        running = asyncio.create_task(pool.run(Checksum(source, 0, CHUNK_BYTES)))
        await asyncio.sleep(0)
        assert pool.in_flight == 1
        await pool.close(30.0)
        assert_moved(await running, content)


async def test_a_mover_that_talks_nonsense_is_replaced(files: Files, tmp_path, monkeypatch) -> None:
    content = content_of(MIB)
    source = files.memory(MIB, content)
    child = tmp_path / "child"
    real = tmp_path / "python"
    # Its first start talks nonsense, and leaves a program behind that holds its pipes open.
    real.write_text(
        f'#!/bin/sh\nif [ -e {child} ]; then exec {sys.executable} "$@"; fi\n'
        f"sleep 600 &\necho $! > {child}\necho hello\nwait\n"
    )
    real.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(real))
    async with pool_of(movers=1, threads=1) as pool:
        assert_moved(await pool.run(Checksum(source, 0, MIB)), content)
        assert pool.restarts == 1
        os.kill(int(child.read_text()), signal.SIGKILL)


async def test_movers_that_cannot_start_are_reported_with_their_last_words(files: Files, tmp_path, monkeypatch) -> None:
    source = files.memory(MIB, content_of(MIB))
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no module named sense' >&2\nexit 3\n")
    fake.chmod(0o755)
    async with pool_of(movers=2, threads=1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(fake))
            with pytest.raises(MoverError, match=r"keep dying.*exit status 3.*no module named sense"):
                await pool.run(Checksum(source, 0, MIB))
            patch.setattr(sys, "executable", str(tmp_path / "missing"))
            with pytest.raises(MoverError, match=r"keep dying.*No such file"):
                await pool.run(Checksum(source, 0, MIB))
        assert_moved(await pool.run(Checksum(source, 0, MIB)), read(source))


async def test_signals_of_a_terminal_do_not_end_a_mover(files: Files) -> None:
    source = files.memory(MIB, content_of(MIB))
    async with pool_of(movers=1, threads=1) as pool:
        await pool.run(Checksum(source, 0, MIB))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pool.pids[0], number)
        await pool.run(Checksum(source, 0, MIB))
        assert pool.restarts == 0
        assert os.getpriority(os.PRIO_PROCESS, pool.pids[0]) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


OWNER = """
import asyncio, sys
from cached.clock import SystemClock
from cached.levels.base import FileRef
from cached.transfer.jobs import Checksum
from cached.transfer.pool import MoverPool

async def main():
    pool = MoverPool(movers=1, threads=1, nice=0, idle_timeout_s=60.0, clock=SystemClock())
    await pool.run(Checksum(FileRef(sys.argv[1], int(sys.argv[2]), 1, True), 0, 1))
    print(*pool.pids, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_mover_dies_with_a_killed_daemon(files: Files) -> None:
    ref = files.memory(1, b"x")
    with subprocess.Popen([sys.executable, "-c", OWNER, ref.path, str(ref.inode)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        mover = psutil.Process(int(owner.stdout.readline()))
        # Stopped, it cannot notice the end of its standard input: only the kernel ends it.
        mover.suspend()
        owner.kill()
    assert psutil.wait_procs([mover], timeout=DEADLINE_S)[1] == [] or mover.status() == psutil.STATUS_ZOMBIE
