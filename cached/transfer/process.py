"""One mover process, as the pool holds it: its pipes, what it works on, and why it ended. Runs in the loop."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from cached.errors import CachedError, MoverError
from cached.transfer import wire
from cached.transfer.jobs import Job, Result

_log = structlog.get_logger(__name__)

_ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
"""The longest answer: a listing of some hundred thousand objects."""
_DRAIN_BYTES = 65536
_LOG_LINE_BYTES = 2000
_LOG_LINES = 1000
_LAST_LINES = 12


@dataclass(slots=True, eq=False)
class Ticket:
    """A job on its way. ``future`` is done when nobody waits any more, be it answered or cancelled."""

    priority: int
    number: int
    job: Job
    key: str | None
    future: asyncio.Future[Result]
    attempts: int = 0
    deadline_s: float = 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.priority, self.number


@dataclass(slots=True, eq=False)
class MoverProcess:
    """A running mover. ``ready`` once it has said so; ``ending`` once it was told to end or is being killed."""

    process: asyncio.subprocess.Process
    idle_since_s: float
    in_flight: dict[int, Ticket] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    ready: bool = False
    ending: bool = False
    fault: str = ""
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def send(self, ticket: Ticket) -> None:
        """Hands it a job. A mover that is dead already loses it, which its end then shows."""
        stdin = self.process.stdin
        assert stdin is not None  # noqa: S101 - opened with a pipe
        self.in_flight[ticket.number] = ticket
        stdin.write(wire.encode_job(ticket.number, ticket.job))

    def finish(self) -> None:
        """Tells it to end, once what it works on is done."""
        self.ending = True
        stdin = self.process.stdin
        assert stdin is not None  # noqa: S101 - opened with a pipe
        stdin.close()

    def kill(self, why: str) -> None:
        """Ends it now; ``why`` is told to those whose jobs it had."""
        self.ending = True
        self.fault = self.fault or why
        if self.process.returncode is None:
            self.process.kill()

    def death(self) -> str:
        """For people: how it ended."""
        if self.fault:
            return self.fault
        code = self.process.returncode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"

    async def converse(
        self, on_answer: Callable[[int, Result | CachedError], None], on_ready: Callable[[], None]
    ) -> None:
        """Until its pipes are closed and it is gone. Nonsense on its standard output kills it."""
        errors = asyncio.create_task(self._log_errors())
        try:
            while line := await self._line():
                if line == wire.READY_LINE and not self.ready:
                    self.ready = True
                    on_ready()
                else:
                    on_answer(*wire.decode_answer(line))
        except MoverError as error:
            self.kill(error.message)
            await self._drain()
        finally:
            # Its last writes to memory or disk have ended only when the process has.
            await self.process.wait()
            await errors

    async def _line(self) -> bytes:
        """The next whole line; empty at the end, where half a line of one that died is dropped."""
        stdout = self.process.stdout
        assert stdout is not None  # noqa: S101 - opened with a pipe
        try:
            line = await stdout.readline()
        except ValueError as error:
            raise MoverError(f"an answer was longer than {_ANSWER_LIMIT_BYTES} bytes") from error
        return line if line.endswith(b"\n") else b""

    async def _drain(self) -> None:
        # A pipe that is not read to its end would keep asyncio from noticing that the process is gone.
        stdout = self.process.stdout
        assert stdout is not None  # noqa: S101 - opened with a pipe
        while await stdout.read(_DRAIN_BYTES):
            pass

    async def _log_errors(self) -> None:
        stderr = self.process.stderr
        assert stderr is not None  # noqa: S101 - opened with a pipe
        rest, logged = b"", 0
        while data := await stderr.read(_LOG_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LOG_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                text = line[:_LOG_LINE_BYTES].decode("utf-8", "replace")
                self.last_lines.append(text)
                if logged < _LOG_LINES:
                    _log.warning("mover.stderr", pid=self.pid, line=text)
                    logged += 1
        if rest:
            self.last_lines.append(rest.decode("utf-8", "replace"))
            _log.warning("mover.stderr", pid=self.pid, line=self.last_lines[-1])


async def start_mover(threads: int, nice: int, now_s: float) -> MoverProcess:
    """Starts one. It inherits the environment (that is how credentials reach it). Raises OSError."""
    # -P: what happens to lie in the working directory is never imported.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "cached.transfer.mover",
        f"--threads={threads}",
        f"--nice={nice}",
        f"--parent={os.getpid()}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_ANSWER_LIMIT_BYTES,
    )
    return MoverProcess(process, now_s)
