"""``python -m tests.simulator``: runs histories, and tells the seed and the last steps of each that fails."""

from __future__ import annotations

import tests.simulator.scale  # noqa: F401 - before everything else of ours

# isort: split
import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.simulator.history import run_one
from tests.simulator.report import Run, note

_BATCH = 50
_TOLD_STEPS = 40


def main() -> int:
    """The exit status: 1 if a history failed."""
    options = _parser().parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets of text is a part of a history
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulator", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    began_s = time.monotonic()
    seeds = range(options.seed, options.seed + options.histories)
    batches = [seeds[at : at + _BATCH] for at in range(0, len(seeds), _BATCH)]
    failed = sorted(seed for found in _outcomes(batches, options) for seed in found)
    run = Run(
        "unbounded" if options.unbounded else "bounded", options.seed, len(seeds), failed,
        time.monotonic() - began_s, options.processes,
    )  # fmt: skip
    print(run)
    if options.note:
        note(run, options.note)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--histories", type=int, default=1, help="how many, with consecutive seeds (default 1)")
    parser.add_argument("--unbounded", action="store_true", help="faults that never end: only safety is checked")
    parser.add_argument("--processes", type=int, default=1, help="so many at a time (default 1)")
    parser.add_argument("--note", type=Path, metavar="FILE", help="adds the outcome to this JSON file")
    parser.add_argument("--verbose", action="store_true", help="tell every step, and what the daemon logs")
    return parser


def _outcomes(batches: list[range], options: argparse.Namespace) -> Iterator[list[int]]:
    """The seeds that failed, batch by batch as they end."""
    running: dict[int, tuple[range, IO[str]]] = {}
    while batches or running:
        while batches and len(running) < options.processes:
            batch, output = batches.pop(0), tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when it is read
            running[_start(batch, output, options)] = batch, output
        child, status = os.wait()
        seeds, told = running.pop(child)
        yield _outcome(seeds, told, os.waitstatus_to_exitcode(status))


def _start(seeds: range, told: IO[str], options: argparse.Namespace) -> int:
    """Runs these in a process of their own, which takes with it what killed daemons leave behind. Its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    gc.disable()  # what killed daemons left must not be finished
    sys.stdout = told  # type: ignore[assignment]
    try:
        failed = [seed for seed in seeds if _tell(seed, options)]
        print("failed:", *failed)
        told.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _outcome(seeds: range, told: IO[str], exit_code: int) -> list[int]:
    """Hands on what a batch told but for its last line, which it ends with."""
    with told:
        told.seek(0)
        text, _, failed = told.read().rpartition("failed:")
    if exit_code:
        print(text, f"seeds {seeds[0]} to {seeds[-1]} were not finished: exit status {exit_code}")
        return list(seeds)
    print(text, end="", flush=True)
    return [int(seed) for seed in failed.split()]


def _tell(seed: int, options: argparse.Namespace) -> bool:
    folder = Path(f"/dev/shm/cached-simulator-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    history, error = run_one(seed, folder / str(seed), unbounded=options.unbounded)
    if options.verbose:
        print(*history.told(), sep="\n")
    elif error is not None:
        print(*history.steps[-_TOLD_STEPS:], sep="\n")
    if error is not None:
        print("".join(traceback.format_exception(error)), end="")
        unbounded = " --unbounded" if options.unbounded else ""
        print(f"seed {seed} failed; again: python -m tests.simulator --seed {seed}{unbounded}\n")
    elif options.verbose:
        print(f"seed {seed}: fingerprint {history.fingerprint}, faults {history.faults_hit}")
    shutil.rmtree(folder, ignore_errors=True)
    return error is not None


if __name__ == "__main__":
    raise SystemExit(main())
