"""`cached run`: a command that has a model for as long as it runs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from cached.cli.connect import Globals, connected, pass_globals, ref_argument, timeout_option
from cached.cli.output import say
from cached.config import process_environment
from cached.errors import NotFoundError
from cached_client.cache import Cache

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_FORWARDED = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH)
"""A terminal sends these to the child as well: passing them on would double them."""


@click.command()
@ref_argument
@click.option("--source", default="", metavar="URI", help="Origin of a model that is not in the catalog.")
@timeout_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@pass_globals
def run(options: Globals, ref: str, source: str, timeout: float | None, command: tuple[str, ...]) -> int:
    """Run a command that finds the model as a directory in memory.

    The model is pulled if needed and held by a lease until the command ends. "{path}" in the arguments is replaced by
    the directory, and CACHED_MODEL_PATH is set to it. Signals are passed on; the exit code is the command's.

    \b
    Example:
      cached run llama-13b -- vllm serve {path} --served-model-name llama-13b
    """  # noqa: D301 click reads the control character
    with connected(options) as connection, Cache(connection) as cache:
        name = f"cached run {os.path.basename(command[0])}"
        with cache.attach(ref, source=source, timeout_s=timeout, wait=True, client_name=name) as model:
            place = model.directory
            if place is None:
                raise NotFoundError(
                    f"the directory of {model.name} is not to be seen from here",
                    hint="mount the daemon's models directory at the same place, or look at daemon.models_dir",
                )
            arguments = [argument.replace("{path}", str(place)) for argument in command]
            code = _run_child(arguments, process_environment() | {"CACHED_MODEL_PATH": str(place)})
            if model.lease_lost is not None:
                say(f"note: the lease of {model.name} was lost meanwhile: {model.lease_lost}")
            return code


def _run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """The child's exit code; 128 + signal if one ended it, 127 or 126 if it could not be started."""
    with _signals_kept() as received:
        try:
            child = subprocess.Popen(arguments, env=environment)  # noqa: S603 running a command is what this is for
        except FileNotFoundError:
            say(f"error: there is no command {arguments[0]!r}")
            return _NOT_FOUND
        except OSError as error:
            say(f"error: cannot run {arguments[0]!r}: {error.strerror}")
            return _NOT_EXECUTABLE
        received.forward_to(child)
        code = child.wait()
    return code if code >= 0 else 128 - code


class _Received:
    """Passes signals on to the child; those that come before there is one wait for it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number in _FROM_TERMINAL and _in_foreground():
            return
        if self._child is None:
            self._waiting.append(number)
        else:
            self._child.send_signal(number)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        for number in self._waiting:
            child.send_signal(number)


def _in_foreground() -> bool:
    """Whether this process is in the foreground group of its terminal, and so the child is too."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextmanager
def _signals_kept() -> Iterator[_Received]:
    """Signals go to the child while it runs, and to us again afterwards."""
    received = _Received()
    before: dict[int, Any] = {number: signal.signal(number, received) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
