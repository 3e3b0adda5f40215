"""cached top: what it prints, what fits a screen, and how it lives on a terminal while the daemon comes and goes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from rich.console import Console

from cached.cli.top.screen import MARKS, Choice, Screen
from cached.overview import Holding, Overview, Problem
from cached.types import ModelSummary
from tests.unit.cli_support import Command, serving
from tests.unit.rpc_support import OVERVIEW, SUMMARY

_SERVE = "import sys; from cached.cli.main import main; sys.exit(main())"
_DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("top")) as (engine, socket):
        yield engine, socket


@pytest.fixture
def cached(daemon, capsys) -> Command:
    engine, socket = daemon
    engine.calls.clear()
    return Command(engine, socket, capsys)


def test_without_a_terminal_it_prints_once_and_ends(cached) -> None:
    ran = cached("top")
    assert (ran.code, ran.err) == (0, "")
    for told in ("needs attention", "L1 ", "70 B of 100 B", "pull to L1", "waited for by vllm (pid 7) and 1 more",
                 "LEASE ON", "python3 in pod 1c7f9e0b, pid 13, uid 14", "other left l1: it is cold", "and 2 more",
                 "! x: s3://b/x: 403"):  # fmt: skip
        assert told in ran.out, told
    assert "\x1b" not in ran.out
    assert cached.engine.calls[-1][0] == "overview"


def test_as_json_it_is_one_document(cached) -> None:
    data = json.loads(cached("top", "-o", "json").out)
    assert data["moves"][0]["speed_bytes_per_s"] == 50
    assert data["uses"][0]["holdings_bytes"]["free"] == 30
    assert data["leases"][0]["container"] == "pod 1c7f9e0b"


@pytest.mark.parametrize("interval", ["0s", "10ms", "soon"])
def test_an_interval_that_cannot_be(cached, interval) -> None:
    ran = cached("top", "--interval", interval)
    assert ran.code == 2
    assert "--interval" in ran.err
    assert cached.engine.calls == []


def test_without_a_daemon_it_ends_as_the_other_commands_do(cached, tmp_path) -> None:
    cached.socket = tmp_path / "nobody.sock"
    ran = cached("top")
    assert ran.code == 1
    assert "hint:" in ran.err


# What fits.


def lines(overview: Overview, width: int, height: int, **settings: object) -> list[str]:
    console = Console(width=width, height=height, file=None, highlight=False)
    with console.capture() as captured:
        console.print(Screen(overview, "node", height=height, **settings))
    return captured.get().splitlines()


def busy() -> Overview:
    models = tuple(dataclasses.replace(SUMMARY, name=f"model-{n:03}-{'x' * (n % 50)}") for n in range(200))
    problems = tuple(Problem("model", "s3://b/x answers 403 " * 5, f"m{n}") for n in range(9))
    return dataclasses.replace(
        OVERVIEW, models=models, model_count=1234, moves=OVERVIEW.moves * 15, move_count=16, problems=problems,
        leases=OVERVIEW.leases * 40, events=OVERVIEW.events * 50,
        stats=dataclasses.replace(OVERVIEW.stats, lease_count=1000),
    )  # fmt: skip


@pytest.mark.parametrize("view", ["models", "leases", "events"])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 25), (132, 43), (200, 70)])
def test_it_fits_the_terminal_to_the_last_line(width, height, view) -> None:
    shown = lines(busy(), width, height, choice=Choice(view))
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    assert "quit" in shown[-1], "the keys are the last line"
    heads = " ".join(line for line in shown if re.match("MODEL|LEASE ON|TIME", line))
    assert {"models": "MODEL", "leases": "LEASE ON", "events": "DECISION"}[view] in heads
    assert sum(" more" in line for line in shown) >= 3


def test_in_a_narrow_terminal_what_matters_stays() -> None:
    text = "\n".join(lines(busy(), 80, 24))
    for told in ("70 B of 100 B, 70 %", " 40 % 0.0 MB/s, 12.0 s left", "and 12 more", "and 7 more: cached health"):
        assert told in text, told


def test_bars_can_be_read_without_colours() -> None:
    assert len({letter for letter, _ in MARKS.values()}) == len(Holding)
    bar = next(line for line in lines(OVERVIEW, 80, 24) if line.startswith("L1"))
    assert re.fullmatch(r"L1 P+H+W+A+C+T+/+x+=+\++\.+ 70 B of 100 B, 70 %", bar)


@pytest.mark.parametrize(
    ("sort", "first"), [("place", "b"), ("name", "a"), ("size", "c"), ("worth", "a"), ("leases", "b")]
)
def test_models_can_be_sorted(sort, first) -> None:
    def model(name: str, **values: object) -> ModelSummary:
        return dataclasses.replace(SUMMARY, name=name, **values)

    models = (model("b", lease_count=9), model("a", worth_s=1e6), model("c", size_bytes=10**12))
    shown = lines(dataclasses.replace(OVERVIEW, models=models, model_count=3), 80, 24, choice=Choice("models", sort))
    head = next(number for number, line in enumerate(shown) if line.startswith("MODEL"))
    assert shown[head + 1].startswith(f"{first} ")


def test_a_hostile_name_commands_no_terminal() -> None:
    model = dataclasses.replace(SUMMARY, name="m\x1b[2Jx\nnext")
    text = "\n".join(lines(dataclasses.replace(OVERVIEW, models=(model,)), 80, 24))
    assert "\x1b" not in text
    assert "m\ufffd[2Jx\ufffdnext" in text


# On a terminal.


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str], width: int, height: int) -> None:
        self._fd, inner = pty.openpty()
        self.resize(width, height)
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=_environment())
        os.close(inner)
        self.text = ""

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))

    def press(self, key: str) -> None:
        self.text = ""
        os.write(self._fd, key.encode())

    def until(self, told: str) -> None:
        """Reads until this was printed since the last key."""
        deadline = time.monotonic() + _DEADLINE_S
        while told not in self.text:
            assert time.monotonic() < deadline, f"no {told!r} in {self.text[-3000:]!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                with_escapes = os.read(self._fd, 65536).decode("utf-8", "replace")
                self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", with_escapes)

    def quit(self) -> int:
        """Presses q and takes what is still written: the exit status."""
        self.press("q")
        with suppress(OSError):  # nobody has the other end any more
            while os.read(self._fd, 65536):
                pass
        return self.process.wait(_DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {
        "TERM": "xterm",
        "LANG": "C.UTF-8",
    }


@contextmanager
def terminal(*arguments: str, width: int = 80, height: int = 24) -> Iterator[Terminal]:
    made = Terminal([sys.executable, "-c", _SERVE, *arguments], width, height)
    try:
        yield made
    finally:
        made.close()


def test_keys_choose_what_is_shown(daemon) -> None:
    engine, socket = daemon
    with terminal("--socket", str(socket), "top", "--interval", "200ms") as it:
        it.until("MODEL")
        it.press("l")
        it.until("LEASE ON")
        it.press("e")
        it.until("DECISION")
        it.resize(150, 60)
        it.press("s")
        it.until("sort: name")
        it.until("NOTES")
        assert engine.calls[-1][0] == "overview"
        assert it.quit() == 0


def test_keys_that_are_typed_at_once_all_count(daemon) -> None:
    with terminal("--socket", str(daemon[1]), "top", "--interval", "200ms") as it:
        it.until("MODEL")
        it.press("\x1b[Bl\x1b[As")  # arrows are no keys
        it.until("sort: name")
        it.until("LEASE ON")
        assert it.quit() == 0


def test_it_goes_on_when_the_daemon_is_back(tmp_path) -> None:
    socket = str(tmp_path / "cached.sock")
    with ExitStack() as stack:
        with serving(tmp_path):
            it = stack.enter_context(terminal("--socket", socket, "top", "--interval", "200ms"))
            it.until("MODEL")
        it.until("No answer since")
        with serving(tmp_path):
            while "No answer" in it.text or "quit" not in it.text:
                it.press("m")
                it.until("quit")
            assert it.quit() == 0
