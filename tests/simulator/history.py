"""A history: daemons one after the other on one simulated machine, all of it decided by a seed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import secrets
from collections.abc import MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from cached.config import Config, load_config
from cached.errors import CachedError
from cached.metrics import Metrics
from tests.simulator.faults import random_faults
from tests.simulator.life import Life
from tests.simulator.loop import SimLoop
from tests.simulator.world import Violation, World

_KEPT: list[object] = []
"""Loops and engines of killed daemons, with their tasks: what is collected would go on, and the dead do not."""


class History:
    """``run`` once. ``steps`` tells what happened."""

    def __init__(self, seed: int, folder: Path, *, unbounded: bool) -> None:
        self.seed = seed
        self.steps: list[str] = []
        self._logged: list[tuple[int, str, dict[str, Any]]] = []
        """What the daemon logged: after how many steps, how and what."""
        self._bugs: list[str] = []
        self._life: Life | None = None
        self._folder = folder
        self._rng = random.Random(f"{seed} {unbounded}")
        self._faults = random_faults(self._rng, unbounded=unbounded)
        self._now_s = 1000.0
        self._lives = self._rng.randint(1, 3)

    def run(self) -> None:
        """Raises Violation."""
        random.seed(self._rng.random())
        ids = random.Random(self._rng.random())
        secrets.token_hex = lambda count=32: ids.randbytes(count).hex()  # type: ignore[assignment]
        structlog.configure(processors=[self._on_log], cache_logger_on_first_use=False)
        world = World(self._folder, self._rng, self._faults)
        world.kernel.install()
        metrics = Metrics()
        try:
            for number in range(self._lives):
                self._live(world, metrics, last=number == self._lives - 1)
        finally:
            world.remove()

    @property
    def fingerprint(self) -> str:
        """The same for the same history."""
        return hashlib.sha256("\n".join(self.steps).encode()).hexdigest()[:16]

    def told(self) -> list[str]:
        """Steps, and between them what the daemon logged."""
        logged: dict[int, list[str]] = {}
        for after, method, event in self._logged:
            logged.setdefault(after, []).append(f"    {method}: {event}".replace(str(self._folder), "…"))
        return [line for at, step in enumerate(["", *self.steps]) for line in (step, *logged.get(at, ())) if line]

    @property
    def faults_hit(self) -> dict[str, int]:
        """Kind → how often."""
        return self._faults.hit

    def _live(self, world: World, metrics: Metrics, *, last: bool) -> None:
        loop = SimLoop(random.Random(self._rng.random()), self._now_s)
        loop.set_exception_handler(lambda _loop, context: self._lost(context))
        if not last and self._rng.random() < 0.8:
            loop.kill_at = int(math.exp(self._rng.uniform(math.log(20), math.log(5000))))
        self._note(f"--- a daemon starts; {'last' if last else 'not last'}, killed at {loop.kill_at}")
        with _running(loop):
            life = Life(world, self._config(world), loop, metrics, self._note, last=last)
        self._life = life
        _KEPT.extend((loop, life))
        task = loop.create_task(life.live())
        _KEPT.append(task)
        task.add_done_callback(lambda _task: loop.stop())
        loop.run_forever()
        self._now_s = loop.time()
        if not loop.killed:
            _tell_first(task)
            self._tell_bugs()
            left = sorted(str(other.get_coro()) for other in asyncio.all_tasks(loop))
            if left:
                raise Violation(f"tasks were left behind: {left}")
            return
        self._tell_bugs()
        self._note(f"--- killed after {loop.steps} steps")
        self._after_kill(world)

    def _after_kill(self, world: World) -> None:
        world.check_blobs()
        for holder in world.holders:
            holder.look_again()
        for holder in [holder for holder in world.holders if not holder.complete]:
            world.release(holder)  # its attach died with the daemon
        if self._rng.random() < 0.3:
            self._note("--- the power was cut")
            world.cut_power()
        elif self._rng.random() < 0.2 and world.flip_bit(world.l1):
            self._note("--- a bit flipped in L1")
            for holder in world.holders:
                holder.tainted = True

    def _config(self, world: World) -> Config:
        folder, config = world.folder, _defaults()
        # All models are some 80 KiB, the largest at most 50.
        l1, l2 = f"{self._rng.choice((60, 80, 120, 300))}KiB", f"{self._rng.choice((60, 100, 200, 400))}KiB"
        return replace(
            config,
            daemon=replace(
                config.daemon,
                state_dir=str(world.state),
                models_dir=str(folder / "models"),
                restart_grace_s=self._rng.choice((0.0, 0.0, 5.0)),
            ),
            l1=replace(config.l1, path=str(world.l1), capacity=l1),
            l2=replace(config.l2, path=str(world.l2), capacity=l2),
        )

    def _note(self, step: str) -> None:
        self.steps.append(step.replace(str(self._folder), "…"))

    def _on_log(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        self._logged.append((len(self.steps), method, dict(event)))
        if method == "exception" or event.get("event") == "internal.traceback":
            import sys
            import traceback

            told = event.get("exc_info")
            error = told if isinstance(told, BaseException) else sys.exc_info()[1]
            if error is not None and not isinstance(error, CachedError):
                where = event.get("where", event.get("event"))
                self._bugs.append(f"{where}: " + "".join(traceback.format_exception(error)))
        elif event.get("event") == "evicted" and self._life is not None:
            wrong = self._life.checks.evicted(event["model"], event["revision"], event["at"], event["reason"])
            self._bugs += [wrong] if wrong else []
        raise structlog.DropEvent

    def _lost(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, CachedError):
            self._bugs.append(f"{context.get('message')}: {error!r}")

    def _tell_bugs(self) -> None:
        if self._bugs:
            raise Violation("the daemon told: " + self._bugs[0])


@cache
def _defaults() -> Config:
    settings = {"transfer.movers": "2", "l1.memory_reserve_bytes": "0B"}
    return load_config(None, {}, settings).config


def _tell_first(task: asyncio.Task[None]) -> None:
    """Of several callers that failed the first."""
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error


@contextmanager
def _running(loop: SimLoop) -> Any:
    """Parts are made within a running loop."""
    from asyncio import events

    events._set_running_loop(loop)
    try:
        yield
    finally:
        events._set_running_loop(None)


def run_one(seed: int, folder: Path, *, unbounded: bool) -> tuple[History, BaseException | None]:
    """The history and what it violated, if it did."""
    history = History(seed, folder, unbounded=unbounded)
    try:
        history.run()
    except Exception as error:
        return history, error
    return history, None
