"""The command: chooses the hops, measures them, and prints them beside what is to be expected."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cached.cli.connect import Globals, connected, pass_globals
from cached.cli.output import output_option
from cached.config import load_config, origin_defaults, process_environment
from cached.units import MIB, format_size, parse_size

if TYPE_CHECKING:
    from cached.cli.bench.hop import Measured, Setting
    from cached.config import Config
    from cached.origins.base import OriginSpec

_LEAST_BYTES = 32 * MIB
_MOST_BYTES = 4096 * MIB
_QUICK_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True)
class Hop:
    """Hops that are measured together. ``place``: the module of this package, and the function that measures them.

    ``slow``: it starts a daemon of its own, and so is left out by ``--quick``. ``details``: for the documents.
    """

    names: tuple[str, ...]
    place: tuple[str, str]
    details: str
    slow: bool = False


HOPS = (
    Hop(
        ("memcpy", "crc64", "sha256"), ("local", "processor"),
        "one core: copying between buffers larger than its caches, CRC64-NVME, SHA-256. Expected: what was measured "
        "elsewhere, with or without SHA instructions",
    ),
    Hop(
        ("shm-fresh", "shm-huge", "shm-recycled"), ("local", "shared_memory"),
        "a segment filled as a mover fills it, each piece checksummed: when it is new, and again when it has its "
        "pages. `shm-huge` says where the mount gives no huge pages",
    ),
    Hop(
        ("l2-write", "l2-read"), ("local", "storage"),
        "a temporary file in each folder of L2, chunk by chunk with O_DIRECT and the threads of a mover, with fsync, "
        "2 s each at most. Expected: a share of the drive's PCIe link, where it tells one",
    ),
    Hop(
        ("origin",), ("origin", "origin"),
        "the first chunks of the largest object of `--source` (else of the catalog's largest model), by the daemon's "
        "planner, lanes and movers in an engine of its own, into memory that has its pages. Expected: half of the "
        "network card's speed, or of what the processors can receive",
    ),
    Hop(
        ("call", "attach"), ("workers", "daemon"),
        "100 calls and 10 warm attaches: at the running daemon if it has a model in L1 (they count as requests for "
        "it), else at a daemon of its own",
        slow=True,
    ),
    Hop(
        ("gpu",), ("workers", "gpu"),
        "a generated model from shared memory to the first GPU through the client's pinned ring, in a process of "
        "`--python`, the best of three. Expected: a share of the GPU's PCIe link",
        slow=True,
    ),
)  # fmt: skip
_NAMES = [name for hop in HOPS for name in hop.names]


def _size(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    try:
        size_bytes = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not _LEAST_BYTES <= size_bytes <= _MOST_BYTES:
        raise click.BadParameter(f"from {format_size(_LEAST_BYTES)} to {format_size(_MOST_BYTES)}, not {value}")
    return size_bytes


@click.command()
@click.option("--only", multiple=True, type=click.Choice(_NAMES), metavar="HOP", help="Only this hop; repeatable.")
@click.option("--skip", multiple=True, type=click.Choice(_NAMES), metavar="HOP", help="Leave this hop out; repeatable.")
@click.option(
    "--size", default="512MiB", show_default=True, metavar="SIZE", callback=_size, help="Bytes of disk, origin and GPU."
)
@click.option("--quick", is_flag=True, help="128 MiB at most, and neither attach nor GPU.")
@click.option("--source", metavar="URI", help="The origin to fetch from.  [the largest model of the catalog]")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="The daemon's configuration.  [/etc/cached/config.toml]"
)
@click.option(
    "--python", default=sys.executable, metavar="PATH", help="The workers' interpreter.  [default: this command's own]"
)
@output_option
@pass_globals
def bench(
    options: Globals,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    size: int,
    quick: bool,
    source: str | None,
    file: Path | None,
    python: str,
    output: str,
) -> None:
    """Measure each hop of a model on this host, and compare it with what is to be expected. Half a minute.

    \b
    memcpy crc64 sha256      one core
    shm-fresh, shm-huge      shared memory as a load fills it, by the pages that its mount gives
    shm-recycled             the same into memory of the pool
    l2-write l2-read         O_DIRECT, by the movers' own code, in each folder of L2
    origin                   the largest object of the source, by the daemon's planner and movers
    call attach              at the running daemon if it has a model in L1, else at one of its own
    gpu                      through the client's pinned ring

    Nothing is left behind, also after Ctrl-C, and the running daemon loads and evicts nothing. Its host does feel it:
    a few seconds of disk, network and memory. "slower" comes with the usual reasons, and the check of `cached doctor`
    that tells more. The exit code is 0 whatever was measured.

    \b
    Examples:
      cached bench
      cached bench --quick -o json
      cached bench --only origin --source s3://bucket/models/llama --size 1GiB
    """  # noqa: D301 click reads the control character
    from cached import logs
    from cached.cli.bench.printing import Printer, print_results
    from cached.cli.measure.scratch import ended_in_order

    logs.configure("critical")  # movers that a Ctrl-C ends are no news
    setting = _setting(options, min(size, _QUICK_BYTES) if quick else size, quick, source, file, python)
    printer = Printer() if output == "table" else None
    found = []
    with ended_in_order():
        for hop in HOPS:
            if (hop.slow and quick and not only) or not any(_is_wanted(name, only, skip) for name in hop.names):
                continue
            for item in _measure(*hop.place)(setting):
                if _is_wanted(item.hop, only, skip):
                    found.append(item)
                    if printer is not None:
                        printer.show(item)
    print_results(found, setting, output)


def _is_wanted(name: str, only: tuple[str, ...], skip: tuple[str, ...]) -> bool:
    return (not only or name in only) and name not in skip


def _measure(module: str, function: str) -> Callable[[Setting], Iterable[Measured]]:
    """By name: importing all of them would slow every ``cached`` command down."""
    found: Any = getattr(importlib.import_module(f"cached.cli.bench.{module}"), function)
    measure: Callable[[Setting], Iterable[Measured]] = found
    return measure


def _setting(
    options: Globals, size_bytes: int, quick: bool, source: str | None, file: Path | None, python: str
) -> Setting:
    from cached.cli.bench.hop import Setting

    environment = process_environment()
    config = load_config(file, environment, {}).config
    spec, why = _origin(config, source)
    with connected(options) as cache:
        socket = str(cache.path) if options.socket or not file else config.daemon.socket
    return Setting(config, socket, python, size_bytes, quick, spec, why, environment)


def _origin(config: Config, source: str | None) -> tuple[OriginSpec | None, str]:
    """The origin to fetch from, with its options, or why there is none. Raises ConfigError."""
    from cached.catalog_file import load_catalog
    from cached.origins.base import OriginSpec

    options: dict[str, str] = {}
    uri = source or ""
    if not uri and config.daemon.catalog:
        models = load_catalog(Path(config.daemon.catalog)).models.values()
        model = max(models, key=lambda item: item.size_bytes or 0, default=None)
        if model is not None:
            uri, options = model.source, dict(model.origin)
    if not uri:
        return None, "no origin is known: give one with --source URI"
    return OriginSpec(uri, origin_defaults(config).get(uri.partition("://")[0].lower(), {}) | options), ""
