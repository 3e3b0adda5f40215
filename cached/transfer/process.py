"""One mover process, as the pool holds it: its pipes, what it works on, and why it ended. Runs in the loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from cached.errors import CachedError, MoverError
from cached.transfer import wire
from cached.transfer.jobs import Group, Job, Result, Threads, Word

_log = structlog.get_logger(__name__)

_PIPE_GRACE_S = 0.5
UNKILLABLE_S = 60.0
"""A mover that was killed and has not ended by then waits in the kernel for a disk that hangs: nobody waits for it."""
_LOG_LINE_BYTES = 2000
_LOG_LINES = 1000
_LAST_LINES = 12


@dataclass(slots=True, eq=False)
class Ticket:
    """A job on its way. ``future`` is done when nobody waits any more, be it answered or cancelled.

    ``mover`` works on it since ``sent_s``, and it is no more than asked to end when it is ``aborted``.
    """

    priority: int
    number: int
    job: Job
    key: str | None
    future: asyncio.Future[Result]
    arrived: asyncio.Future[None]
    group: Group
    avoid: Mover | None = None
    mover: Mover | None = None
    sent_s: float = 0.0
    attempts: int = 0
    deadline_s: float = 0.0
    aborted: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return self.priority, self.number


class Mover(ABC):
    """A running mover. ``ready`` once it has said so; ``ending`` once it was told to end or is being killed.

    ``lost``: the kernel does not let it end. Done when it has: until then it may write to what its jobs were to fill.
    """

    lost: asyncio.Future[None] | None = None

    def __init__(self, now_s: float) -> None:
        self.idle_since_s = now_s
        self.in_flight: dict[int, Ticket] = {}
        self.keys: set[str] = set()
        self.loads = dict.fromkeys(Group, 0)
        self.ready = False
        self.ready_s = 0.0
        self.ending = False
        self.fault = ""
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    @abstractmethod
    def pid(self) -> int:
        """Its process id."""

    def send(self, ticket: Ticket) -> None:
        """Hands it a job. A mover that is dead already loses it, which its end then shows."""
        self.in_flight[ticket.number] = ticket
        self.loads[ticket.group] += 1
        ticket.mover = self
        self._give(ticket.number, ticket.job)

    def take_back(self, number: int) -> Ticket | None:
        """The job that was answered, which it does not work on any more."""
        ticket = self.in_flight.pop(number, None)
        if ticket is not None:
            self.loads[ticket.group] -= 1
            ticket.mover = None
        return ticket

    def say(self, ticket: Ticket, word: Word) -> None:
        """Tells it something of a job that it works on; nothing once it was told to end."""
        if not self.ending:
            self._tell(ticket.number, word)

    @abstractmethod
    def _give(self, number: int, job: Job) -> None: ...

    @abstractmethod
    def _tell(self, number: int, word: Word) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Tells it to end, once what it works on is done."""

    @abstractmethod
    def kill(self, why: str) -> None:
        """Ends it now; ``why`` is told to those whose jobs it had."""

    @abstractmethod
    def death(self) -> str:
        """For people: how it ended."""

    @abstractmethod
    async def converse(
        self, on_answer: Callable[[int, Result | CachedError | Word], None], on_ready: Callable[[], None]
    ) -> None:
        """Until it is gone and its last word was heard."""


class MoverProcess(Mover):
    """A mover that is a process of its own.

    Its end is learned from the kernel, not from its pipes: a program that it started may hold those open.
    """

    def __init__(self, popen: subprocess.Popen[bytes], now_s: float) -> None:
        """Use ``start_mover``."""
        super().__init__(now_s)
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._patience: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._answers = asyncio.StreamReader(limit=wire.ANSWER_LIMIT_BYTES)
        self._errors = asyncio.StreamReader()
        self._transports: list[asyncio.BaseTransport] = []
        self._stdin: asyncio.WriteTransport | None = None

    @property
    def pid(self) -> int:
        """See Mover."""
        return self._popen.pid

    async def connect(self) -> None:
        """Takes up its pipes. To be awaited once, before anything else."""
        popen, loop = self._popen, self._loop
        self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, popen.stdin)
        for stream, reader in ((popen.stdout, self._answers), (popen.stderr, self._errors)):
            transport, _ = await loop.connect_read_pipe(partial(asyncio.StreamReaderProtocol, reader), stream)
            self._transports.append(transport)
        self._transports.append(self._stdin)

    def _give(self, number: int, job: Job) -> None:
        self._write(wire.encode_job(number, job))

    def _tell(self, number: int, word: Word) -> None:
        self._write(wire.encode_word(number, word))

    def finish(self) -> None:
        """See Mover."""
        assert self._stdin is not None  # noqa: S101 - connected
        self.ending = True
        self._stdin.close()

    def kill(self, why: str) -> None:
        """See Mover."""
        self.ending = True
        self.fault = self.fault or why
        if not self._exited.done():
            self._popen.kill()
            if self._patience is None:
                self._patience = self._loop.call_later(UNKILLABLE_S, self._give_up)

    def death(self) -> str:
        """See Mover."""
        if self.fault:
            return self.fault
        code = self._popen.returncode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"

    async def converse(
        self, on_answer: Callable[[int, Result | CachedError | Word], None], on_ready: Callable[[], None]
    ) -> None:
        """See Mover. Nonsense on its standard output kills it."""
        log = asyncio.create_task(self._log_errors())
        try:
            while line := await self._line():
                if line == wire.READY_LINE and not self.ready:
                    self.ready = True
                    on_ready()
                else:
                    on_answer(*wire.decode_answer(line))
        except MoverError as error:
            self.kill(error.message)
        except asyncio.CancelledError:
            self.kill("the daemon's loop ended")
            raise
        finally:
            # Its last writes to memory or disk have ended only when the process has.
            await self._over
            if self.lost is not None:
                log.cancel()
            await asyncio.wait([log])
            for transport in self._transports:
                transport.close()

    def _write(self, line: bytes) -> None:
        assert self._stdin is not None  # noqa: S101 - connected
        if not self._stdin.is_closing():  # uvloop raises once the pipe broke, where asyncio ignores that
            self._stdin.write(line)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._popen.wait()
        self._exited.set_result(None)
        if self._patience is not None:
            self._patience.cancel()
        if not self._over.done():
            self._over.set_result(None)
        # What it wrote before is still in the pipes; nobody else is waited for.
        self._loop.call_later(_PIPE_GRACE_S, self._end_pipes)

    def _give_up(self) -> None:
        """It was killed, and does not end."""
        self.lost = self._exited
        self.fault = f"{self.fault}; it cannot be ended: it waits for a disk that hangs"
        self._over.set_result(None)
        self._end_pipes()

    def _end_pipes(self) -> None:
        for reader in (self._answers, self._errors):
            reader.feed_eof()

    async def _line(self) -> bytes:
        """The next whole line; empty at the end, where half a line of one that died is dropped."""
        try:
            line = await self._answers.readline()
        except ValueError as error:
            raise MoverError(f"an answer was longer than {wire.ANSWER_LIMIT_BYTES} bytes") from error
        return line if line.endswith(b"\n") else b""

    async def _log_errors(self) -> None:
        rest, logged = b"", 0
        while data := await self._errors.read(_LOG_LINE_BYTES):
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


class StartMover(Protocol):
    """How movers come up."""

    async def __call__(self, threads: Threads, nice: int, now_s: float) -> Mover:
        """A mover that says when it is ready. Raises OSError."""
        ...


async def start_mover(threads: Threads, nice: int, now_s: float) -> MoverProcess:
    """Starts one. It inherits the environment (that is how credentials reach it). Raises OSError."""
    # -P: what happens to lie in the working directory is never imported.
    command = [sys.executable, "-P", "-m", "cached.transfer.mover"]
    options = [f"parent={os.getpid()}", f"nice={nice}"]
    options += [f"{group.value}={threads.of(group)}" for group in Group]
    # It blocks for the milliseconds of a vfork, as asyncio's own way to start a process does.
    popen = subprocess.Popen(  # noqa: ASYNC220, S603
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    try:
        mover = MoverProcess(popen, now_s)
        await mover.connect()
    except BaseException:
        popen.kill()
        raise
    return mover
