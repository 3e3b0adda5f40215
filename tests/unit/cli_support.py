"""A server with constant answers behind the real socket, and the command run against it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cached.cli.main import main
from tests.unit.rpc_support import FakeEngine, served


@dataclass
class Ran:
    code: int
    out: str
    err: str


@dataclass
class Command:
    """Runs `cached` in this process."""

    engine: FakeEngine
    socket: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Ran:
        self.capture.readouterr()
        code = main(["--socket", str(self.socket), *arguments])
        captured = self.capture.readouterr()
        return Ran(code, captured.out, captured.err)


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[tuple[FakeEngine, Path]]:
    """The server, in a thread with a loop of its own."""
    started: list[tuple[FakeEngine, Path]] = []
    ready, stop, loops = threading.Event(), asyncio.Event(), []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        try:
            async with served(folder, **options) as server:
                started.append((server.engine, Path(server.server.socket)))
                ready.set()
                await stop.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield started[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()
