"""``python -m tests.simulator``: runs histories, and tells the seed and the last steps of each that fails."""

from __future__ import annotations

import tests.simulator.scale  # noqa: F401 - before everything else of ours

# isort: split
import argparse
import gc
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from tests.simulator.history import run_one

_BATCH = 50
_TOLD_STEPS = 40


def main() -> int:
    """The exit status: 1 if a history failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--histories", type=int, default=1, help="how many, with consecutive seeds (default 1)")
    parser.add_argument("--unbounded", action="store_true", help="faults that never end: only safety is checked")
    parser.add_argument("--verbose", action="store_true", help="tell every step")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets of text is a part of a history
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulator", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    began_s, failed = time.monotonic(), 0
    seeds = range(options.seed, options.seed + options.histories)
    for at in range(0, len(seeds), _BATCH):
        failed += _batch(seeds[at : at + _BATCH], options)
    took_s = time.monotonic() - began_s
    mode = "unbounded" if options.unbounded else "bounded"
    print(
        f"{len(seeds)} histories with {mode} faults, {failed} failed; {took_s:.1f} s, "
        f"{60 * len(seeds) / took_s:.0f} a minute"
    )
    return 1 if failed else 0


def _batch(seeds: range, options: argparse.Namespace) -> int:
    """Runs these in a process of their own, which takes with it what killed daemons leave behind. How many failed."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        gc.disable()  # what killed daemons left must not be finished
        failed = 0
        try:
            failed = sum(_tell(seed, options) for seed in seeds)
        except BaseException:
            traceback.print_exc()
            failed += 1
        sys.stdout.flush()
        os._exit(min(failed, 200))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else len(seeds)


def _tell(seed: int, options: argparse.Namespace) -> bool:
    folder = Path(f"/dev/shm/cached-simulator-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    history, error = run_one(seed, folder / str(seed), unbounded=options.unbounded)
    if error is not None or options.verbose:
        print(*history.steps[-(10**9 if options.verbose else _TOLD_STEPS) :], sep="\n")
    if error is not None:
        print("".join(traceback.format_exception(error)), end="")
        unbounded = " --unbounded" if options.unbounded else ""
        print(f"seed {seed} failed; again: python -m tests.simulator --seed {seed}{unbounded}\n")
    elif options.verbose:
        print(f"seed {seed}: fingerprint {history.fingerprint}, faults {history._faults.hit}")
    shutil.rmtree(folder, ignore_errors=True)
    return error is not None


if __name__ == "__main__":
    raise SystemExit(main())
