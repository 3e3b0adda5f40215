"""`cached serve`: the daemon itself."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import structlog

from cached import heap, logs
from cached.cli.connect import Globals, pass_globals
from cached.config import LoadedConfig, load_config, process_environment
from cached.errors import CachedError
from cached.sdnotify import Notifier

FLAGS = {
    "socket": "daemon.socket",
    "state_dir": "daemon.state_dir",
    "catalog": "daemon.catalog",
    "log_level": "daemon.log_level",
    "l1_capacity": "l1.capacity",
    "l2_capacity": "l2.capacity",
    "http_listen": "http.listen",
}
"""Parameter → setting. Flags go over the environment and the file."""


@click.command()
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="Configuration file.  [/etc/cached/config.toml]"
)
@click.option("--socket", metavar="PATH", help="Unix socket to serve on.")
@click.option("--state-dir", metavar="DIR", help="Folder of what outlives a restart.")
@click.option("--catalog", metavar="FILE", help="Catalog of models, JSON or TOML.")
@click.option("--l1-capacity", metavar="SIZE", help="Budget of shared memory, such as 64GiB or 50%.")
@click.option("--l2-capacity", metavar="SIZE", help="Budget of local disk, such as 500GiB or 80%.")
@click.option(
    "--http-listen", metavar="HOST:PORT", help="Where to serve metrics, health and the status page; '' for off."
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@pass_globals
def serve(options: Globals, /, file: Path | None, **flags: str | None) -> int:
    """Run the daemon in the foreground until it is stopped.

    Settings come from defaults, then the file, then CACHED_SECTION_KEY variables, then these flags; see
    `cached config show`. SIGTERM drains. SIGHUP reads the catalog again, and the budgets of the levels from the file.

    \b
    Examples:
      cached serve
      cached serve --state-dir ~/.cache/cached --l1-capacity 16GiB --catalog models.json
    """  # noqa: D301 click reads the control character
    heap.put_off_the_collector()
    given = {"socket": options.socket or None} | {name: value for name, value in flags.items() if value is not None}
    overrides = {FLAGS[name]: value for name, value in given.items() if value is not None}
    environment = process_environment()

    def read() -> LoadedConfig:
        return load_config(file, environment, overrides)

    try:
        loaded = read()
    except CachedError as error:
        Notifier.from_environment(environment).status(f"failed: {error.message}")
        logs.configure()
        _log_end(error)
        raise
    from cached.daemon import serve as run_daemon

    try:
        return run_daemon(loaded, environment, read)
    except CachedError as error:
        _log_end(error)
        raise


def _log_end(error: CachedError) -> None:
    """For programs that read the log. Who sits at a terminal reads what the command prints in the end."""
    if not sys.stderr.isatty():
        log = structlog.get_logger(__name__)
        log.error("daemon.failed", reason=error.reason, chain=error.chain, hint=error.hint, **error.fields)
