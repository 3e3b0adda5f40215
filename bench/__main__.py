"""``python -m bench [PART…]``: measures, prints tables, and writes ``bench/results/PART.json``.

Exits with 1 when code of ours failed; what a machine lacks, or a peer's failure, is recorded and shown.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from rich.console import Console

from bench import ending, hardware
from bench.checkpoints import Checkpoints
from bench.options import Options
from bench.results import FOLDER, PartResult, Role, Unavailable, merged, read_part
from bench.show import show_part
from cached.units import parse_size

PARTS = Path(__file__).with_name("parts")
_PEERS = Path(".venv-peers/bin/python")
_ENVIRONMENT = ("CACHED_", "AWS_", "BOTO_", "RUNAI_", "RCLONE_")


class Part(Protocol):
    """A module of ``bench/parts``; its docstring says what is measured, and what the limit is."""

    TITLE: str

    def run(self, options: Options) -> PartResult:
        """Measures. Raises Unavailable where the machine lacks what all of the part needs."""


def part_names() -> list[str]:
    """All parts, by name."""
    return sorted(path.stem for path in PARTS.glob("*.py") if path.stem != "__init__")


def load_part(name: str) -> Part:
    """The module of a part."""
    return cast("Part", importlib.import_module(f"bench.parts.{name}"))


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    names = part_names()
    if arguments.list:
        for name in names:
            console.print(f"[bold]{name}[/bold]  {load_part(name).TITLE}")
        return 0
    unknown = sorted(set(arguments.parts) - set(names))
    if unknown:
        console.print(f"there is no part {', '.join(unknown)}; there are {', '.join(names)}")
        return 2
    for variable in [key for key in os.environ if key.startswith(_ENVIRONMENT)]:
        del os.environ[variable]  # nothing of the developer's own reaches what is measured
    ending.prepare()
    try:
        succeeded = [_run(name, arguments, console) for name in arguments.parts or names]
    finally:
        ending.kill_descendants()
    return 0 if all(succeeded) else 1


def _run(name: str, arguments: argparse.Namespace, console: Console) -> bool:
    """Measures a part, shows and writes it. False when anything of ours failed."""
    with _folder(arguments.dir) as folder:
        options = _options(arguments, folder, console)
        console.print(f"\n[bold]{name}[/bold]: {load_part(name).TITLE}")
        result = _measure(name, options)
    if result is None:
        return False
    measured = result.contests or any(table.rows for table in result.tables)
    if not (measured or result.unavailable):
        console.print(f"{name} has no contest {', '.join(sorted(options.contests))}: nothing was measured")
        return False
    show_part(console, result)
    if arguments.out or not (arguments.quick or arguments.only):
        console.print(f"written: {_write(result, arguments.out or FOLDER, keep=bool(arguments.contests))}")
    return _all_of_ours(result)


def _measure(name: str, options: Options) -> PartResult | None:
    """None when it failed, and that was printed."""
    part = load_part(name)
    try:
        result = part.run(options)
    except Unavailable as reason:
        result = PartResult(name, part.TITLE, unavailable=str(reason))
    except Exception:
        traceback.print_exc()
        return None
    result.hardware = hardware.describe(options.folder)
    when = f"{result.hardware['time'][:10]}, revision {result.hardware['revision']}, {options.rounds} rounds"
    for contest in result.contests:
        contest.when = when
    result.options = {"rounds": options.rounds, "size_bytes": options.size_bytes, "quick": options.quick}
    return result


def _write(result: PartResult, folder: Path, *, keep: bool) -> Path:
    """With ``keep``, contests that were not held this time stay as they were."""
    before = folder / f"{result.part}.json"
    if keep and before.exists():
        result = merged(read_part(before), result)
    return result.write(folder)


def _all_of_ours(result: PartResult) -> bool:
    return not any(item.failed and item.role is Role.OURS for contest in result.contests for item in contest.standings)


def _options(arguments: argparse.Namespace, folder: Path, console: Console) -> Options:
    quick = arguments.quick
    return Options(
        rounds=arguments.rounds or (1 if quick else 5),
        size_bytes=parse_size(arguments.size or ("64MB" if quick else "2GB")),
        quick=quick,
        folder=folder,
        checkpoints=Checkpoints(folder / "checkpoints"),
        console=console,
        peers_python=arguments.peers.absolute(),  # not resolved: the link's place tells the environment
        only=frozenset(filter(None, arguments.only.split(","))),
        contests=frozenset(filter(None, arguments.contests.split(","))),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure each hop beside the peers.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="rounds of each contest (default: 5)")
    parser.add_argument("--size", default="", help="size of the checkpoint (default: 2GB)")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny checkpoint, to see that it works")
    parser.add_argument("--only", default="", metavar="NAMES", help="contestants, by name: cached,runai,limit")
    parser.add_argument("--contests", default="", metavar="NAMES", help="contests of the part, by name: http")
    parser.add_argument("--peers", type=Path, default=_PEERS, metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--dir", help="where the temporary folder is made (default: the system's)")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON (default: bench/results; none with --only or --quick)"
    )
    return parser


@contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cached-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
