"""``python -m bench.churn``: runs the churn, prints what was found, and writes ``bench/results/churn/NAME.json``.

Exits with 1 when anything grew, was wrong, or was left over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bench import ending, hardware
from bench.churn.report import as_result
from bench.churn.run import Plan, run
from bench.results import FOLDER
from bench.show import show_part
from cached.units import parse_duration

_ENVIRONMENT = ("CACHED_", "AWS_", "BOTO_", "RUNAI_", "RCLONE_")


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    arguments = _parser().parse_args(argv)
    plan = Plan(
        duration_s=parse_duration(arguments.duration),
        models=arguments.models,
        leases=arguments.leases,
        workers=arguments.workers,
        threads=arguments.threads,
        seed=arguments.seed,
        daemon_kill_s=parse_duration(arguments.daemon_kills) if arguments.daemon_kills else 0.0,
    )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for variable in [key for key in os.environ if key.startswith(_ENVIRONMENT)]:
        del os.environ[variable]  # nothing of the developer's own reaches what is measured
    ending.prepare()
    folder = Path(tempfile.mkdtemp(prefix="cached-churn-", dir=arguments.dir))
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        outcome = run(plan, folder, lambda text: console.print(text, markup=False))
        result = as_result(outcome, arguments.name, arguments.note)
        result.hardware = {**hardware.describe(folder), "started": started}
    finally:
        ending.kill_descendants()
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    show_part(console, result)
    for problem in outcome.problems:
        console.print(problem, style="red", markup=False)
    if arguments.out:
        console.print(f"written: {result.write(arguments.out)}")
    return 1 if outcome.problems or any(item.reached is False for item in result.requirements) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.churn",
        description="Everything at once against one daemon, for long: workers attach and release as fast as they can, "
        "operators pull, evict, remove, pin and verify below them, workers and movers are killed. Fails if a wrong "
        "byte is served, anything grows, or anything is left over.",
    )
    parser.add_argument("--duration", default="1h", metavar="TIME", help="how long: 90s, 5m, 1h (default: 1h)")
    parser.add_argument("--models", type=int, default=200, metavar="N", help="models (default: 200)")
    parser.add_argument("--leases", type=int, default=1000, metavar="N", help="leases held at once (default: 1000)")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="processes that hold them (default: 8)")
    parser.add_argument("--threads", type=int, default=3, metavar="N", help="threads of each worker (default: 3)")
    parser.add_argument(
        "--daemon-kills", default="", metavar="TIME",
        help="SIGKILL the daemon about so often, too; flatness is then not judged (default: never)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of models and of what befalls them (default: 1)")
    parser.add_argument("--note", default="", metavar="TEXT", help="what readers of the figures should know")
    parser.add_argument("--name", default="hour", help="name of the result (default: hour)")
    parser.add_argument("--dir", help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder, with all logs")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the JSON (default: none; the kept ones are in {FOLDER.name}/churn)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
