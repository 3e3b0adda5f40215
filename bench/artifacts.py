"""What a restored compile cache is worth: starts of the same worker with and without it, each in a fresh process.

``python -m bench.artifacts [--runs 3] [--out FILE]``. Two daemons with nothing in common but an S3 server (rclone): on
the first a worker compiles and saves, on the second, which has nothing, one restores. Beside them the same worker
compiles into an empty directory without any cache, as at every start today. Torch's import is in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.compile_starts import COLUMNS, rows_of
from bench.hardware import describe as hardware
from tests.integration.harness import DaemonProcess, wait_for
from tests.servers import RcloneS3

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="starts of each kind")
    parser.add_argument("--out", type=Path, help="also write JSON there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cached-bench-") as folder:
        rows = measure(Path(folder), arguments.runs)
        found = {"hardware": hardware(Path(folder)), "starts": rows}
    show(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, runs: int) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {
        "no cache": [],
        "first start, saved": [],
        "restored from S3": [],
        "restored": [],
    }
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(RcloneS3(folder / "s3"))
        s3.create_bucket(BUCKET)
        for run in range(runs):
            first = stack.enter_context(_daemon(folder / f"a{run}", s3, run))
            second = stack.enter_context(_daemon(folder / f"b{run}", s3, run))
            places = iter(folder / f"caches{run}" / str(number) for number in range(9))
            rows["no cache"].append(start(first, next(places), "--no-cache"))
            rows["first start, saved"].append(start(first, next(places)))
            wait_for(partial(_uploaded, folder / "s3", run), "the upload")
            rows["restored from S3"].append(start(second, next(places)))
            rows["restored"].append(start(second, next(places)))
    return rows


def _daemon(folder: Path, s3: RcloneS3, run: int) -> DaemonProcess:
    settings = {
        "artifacts": {"save": True, "destination": f"s3://{BUCKET}/run{run}"},
        "s3": {"endpoint_url": s3.endpoint_url},
    }
    return DaemonProcess(folder, settings=settings, environment=s3.env())


def _uploaded(root: Path, run: int) -> bool:
    return bool(list((root / BUCKET / f"run{run}").glob("*/key.json")))


def start(daemon: DaemonProcess, directory: Path, *flags: str) -> dict[str, Any]:
    """One start of the worker in a process of its own; with ``process_s``, what it took in all."""
    began_s = time.perf_counter()
    command = [sys.executable, "-m", "bench.compile_worker", str(daemon.socket), str(directory), *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["equal"], "what was compiled computes something else"
    return told | {"process_s": time.perf_counter() - began_s}


def show(rows: dict[str, list[dict[str, Any]]]) -> None:
    console = Console()
    console.print(
        f"A module of one MLP block, compiled by inductor for the CPU; median of {len(rows['no cache'])} starts."
    )
    table = Table(*COLUMNS)
    for row in rows_of(rows):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
