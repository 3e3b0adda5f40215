"""The mover process: ``python -m cached.transfer.mover``. Takes jobs on standard input, answers on standard output.

It ends when its standard input does, and never outlives the daemon: the kernel kills it when the daemon dies. What else
is written to standard output or standard error (by a library, say) reaches the daemon's log, never the answers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from cached import heap, priority
from cached.errors import CachedError, MoverError
from cached.transfer import wire
from cached.transfer.control import Control
from cached.transfer.jobs import Group, Job, Threads, Word, group_of
from cached.transfer.worker import Worker

_PR_SET_PDEATHSIG = 1


class _Answers:
    """Writes whole lines to the daemon, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        rest = memoryview(line)
        with self._lock:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def main(arguments: Sequence[str]) -> int:
    """Serves until standard input ends; what was asked before is answered first."""
    heap.share_one_arena()
    heap.put_off_the_collector()
    parent_pid, nice, threads = _parse(arguments)
    # Only the daemon ends a mover: a Ctrl-C on its terminal must leave it the time to drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _die_with(parent_pid):
        return 1
    priority.make_way(nice)
    questions, answers = _take_pipes()
    answers.write(wire.READY_LINE)
    with questions:
        _Desk(answers, threads).serve(questions)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[int, int, Threads]:
    """The daemon's process id, the niceness and the threads, as name=value; see `process.start_mover`.

    Importing argparse would take a tenth of the time in which a mover starts.
    """
    try:
        given = {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
        return given["parent"], given["nice"], Threads(**{group.value: given[group.value] for group in Group})
    except (KeyError, ValueError):
        raise SystemExit("movers are started by the daemon: cached serve") from None


def _die_with(parent_pid: int) -> bool:
    """Asks the kernel to kill this process with its parent; False when the parent is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return os.getppid() == parent_pid


def _take_pipes() -> tuple[BinaryIO, _Answers]:
    """The pipes to the daemon, for this module alone.

    For everybody else, also programs that a library starts (to get credentials, say), standard input is empty and
    standard output is standard error.
    """
    questions, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(questions, "rb"), _Answers(answers)


class _Desk:
    """Hands each job to a thread of its group, and what is said of it to whoever works on it."""

    def __init__(self, answers: _Answers, threads: Threads) -> None:
        self._answers = answers
        self._worker = Worker()
        self._controls: dict[int, Control] = {}
        self._executors = {
            group: ThreadPoolExecutor(threads.of(group), thread_name_prefix=group.value) for group in Group
        }

    def serve(self, questions: BinaryIO) -> None:
        """Until the questions end; what was asked before is answered first."""
        try:
            for line in questions:
                request_id, asked = wire.decode_job(line)
                if isinstance(asked, Word):
                    self._tell(request_id, asked)
                else:
                    self._start(request_id, asked)
        finally:
            for group in (Group.ORIGIN, Group.LOCAL):
                self._executors[group].shutdown(wait=True)
            # Hedges wait for a word that nobody can say any more.
            for control in list(self._controls.values()):
                control.abort.abort()
            self._executors[Group.HEDGE].shutdown(wait=True)
            self._worker.close()

    def _start(self, request_id: int, job: Job) -> None:
        control = Control(lambda: self._answers.write(wire.encode_word(request_id, Word.ARRIVED)))
        self._controls[request_id] = control
        self._executors[group_of(job)].submit(self._answer, request_id, job, control)

    def _tell(self, request_id: int, word: Word) -> None:
        control = self._controls.get(request_id)
        if control is None:
            return  # answered meanwhile
        if word is Word.ABORT:
            control.abort.abort()
        else:
            control.proceed()

    def _answer(self, request_id: int, job: Job, control: Control) -> None:
        try:
            line = wire.encode_result(request_id, self._worker.perform(job, control))
        except CachedError as error:
            line = wire.encode_error(request_id, error)
        except Exception as error:  # noqa: BLE001 - the boundary of the process: logged here, reported to the daemon
            traceback.print_exc()
            failure = MoverError(
                f"{type(job).__name__} failed in a mover",
                hint="report it with the traceback: journalctl -u cached | grep mover.stderr",
                raised=type(error).__name__,
            )
            failure.__cause__ = error
            line = wire.encode_error(request_id, failure)
        del self._controls[request_id]
        try:
            self._answers.write(line)
        except OSError:
            # The daemon reads no more: nobody is left to answer.
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
