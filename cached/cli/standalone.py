"""`cached pull --standalone`: a model in an ordinary folder, without a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from cached import logs
from cached.catalog_file import CatalogModel, load_catalog
from cached.cli.failures import INTERRUPTED
from cached.cli.output import clean, print_json, rate, say, short
from cached.cli.progress import Meter, meter
from cached.config import Config, load_config, process_environment
from cached.errors import TimeoutExpiredError
from cached.refs import parse_ref
from cached.seed import Thoroughness
from cached.signatures import check_of
from cached.standalone import Pulled, SeedFolder, SeedPull, Wanted, open_tools
from cached.units import format_duration, format_size

_SHOW_S = 0.1


@dataclass(frozen=True, slots=True)
class Standalone:
    """The options of the command."""

    ref: str
    source: str
    timeout_s: float | None
    folder: Path
    catalog: Path | None
    file: Path | None
    verify: Thoroughness
    offline: bool
    force: bool
    max_memory: int


def pull_standalone(options: Standalone, output: str) -> int:
    """Runs it, prints what it did, and returns the exit code. Raises CachedError."""
    config = load_config(options.file, process_environment(), {}).config
    logs.configure("error", "console")
    path = options.catalog or (Path(config.daemon.catalog) if config.daemon.catalog else None)
    keys = config.catalog.public_keys
    models = load_catalog(path, check_of(keys, path)).models if path else {}
    with meter(quiet=output == "json") as bar:
        stopped, pulled = asyncio.run(_run(options, config, dict(models), bar))
    if pulled is None:
        say(f"interrupted: {stopped}")
        return INTERRUPTED
    _show(pulled, options, output)
    return 0


async def _run(
    options: Standalone, config: Config, models: dict[str, CatalogModel], bar: Meter
) -> tuple[str, Pulled | None]:
    """What it did; or None, and what is kept of a pull that was interrupted."""
    ref = parse_ref(options.ref)
    wanted = Wanted(ref, options.source, Thoroughness(options.verify), options.offline, options.force)
    async with open_tools(config, models, max_memory_bytes=options.max_memory) as tools:
        pull = SeedPull(tools, SeedFolder(options.folder), wanted, _each_once(bar))
        task = asyncio.ensure_future(pull.run())
        with _interrupting(task):
            shown = asyncio.ensure_future(_watch(pull, bar))
            try:
                async with asyncio.timeout(options.timeout_s):
                    return "", await task
            except TimeoutError as error:
                raise TimeoutExpiredError(
                    f"{ref.name} was not pulled within {format_duration(options.timeout_s or 0)}: {_kept(pull)}",
                    hint="run the same command again; it goes on from there",
                    what="pull", timeout_s=options.timeout_s,
                ) from error  # fmt: skip
            except asyncio.CancelledError:
                return f"{_kept(pull)}; the same command goes on from there", None
            finally:
                shown.cancel()
                await asyncio.gather(shown, task, return_exceptions=True)


def _kept(pull: SeedPull) -> str:
    progress = pull.progress
    if not progress.total_bytes:
        return "nothing was fetched yet"
    return f"{format_size(progress.done_bytes)} of {format_size(progress.total_bytes)} are verified and kept"


@contextlib.contextmanager
def _interrupting(task: asyncio.Future[Pulled]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the pull in order: movers are ended, and what was verified is noted."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _watch(pull: SeedPull, bar: Meter) -> None:
    while True:
        progress = pull.progress
        bar.update(f"{progress.name}: {progress.phase}", progress.done_bytes, progress.total_bytes)
        await asyncio.sleep(_SHOW_S)


def _each_once(bar: Meter) -> Callable[[str], None]:
    """Tells why it takes longer: each reason once, however many ranges it concerns."""
    told: set[str] = set()

    def tell(why: str) -> None:
        if why not in told:
            told.add(why)
            bar.line(why)

    return tell


def _show(pulled: Pulled, options: Standalone, output: str) -> None:
    manifest = pulled.manifest
    if output == "json":
        print_json({
            "name": manifest.name, "revision": manifest.revision, "source": manifest.source,
            "folder": str(options.folder.absolute()), "files": len(manifest.files), "size_bytes": manifest.total_bytes,
            "checked_by": manifest.checked_by.value, "origin_bytes": pulled.origin_bytes,
            "kept_bytes": pulled.kept_bytes, "resumed_bytes": pulled.resumed_bytes,
            "copied_bytes": pulled.copied_bytes, "damaged_files": list(pulled.damaged_files),
            "removed_files": list(pulled.removed_files), "seconds": pulled.seconds, "notes": list(manifest.notes),
        })  # fmt: skip
        return
    click.echo(clean(f"{manifest.name}@{short(manifest.revision)}: {_what(pulled)}"))
    for path in pulled.damaged_files:
        say(f"mended: {path}")
    for path in pulled.removed_files:
        say(f"removed: {path}, which the model no longer has")
    for note in manifest.notes:
        say(f"note: {note}")


def _what(pulled: Pulled) -> str:
    manifest = pulled.manifest
    told = f"{format_size(manifest.total_bytes)} in {len(manifest.files)} files, checked by {manifest.checked_by}"
    if not pulled.origin_bytes:
        return f"{told}; all of it was there"
    speed = rate(pulled.origin_bytes, pulled.seconds)
    came = f"{format_size(pulled.origin_bytes)} from the origin in {format_duration(pulled.seconds)}"
    there = pulled.kept_bytes + pulled.resumed_bytes
    return f"{told}; {came}" + (f" ({speed})" if speed else "") + (f", {format_size(there)} was there" if there else "")
