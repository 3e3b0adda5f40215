"""The verbs about the daemon itself: stats, events, health, config, catalog, version."""

from __future__ import annotations

import csv
import json
import platform
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from cached import __version__
from cached.cli.connect import Globals, connected, pass_globals, wait_option
from cached.cli.failures import FAILED
from cached.cli.output import (
    clean,
    enum_word,
    output_option,
    print_json,
    print_pairs,
    print_table,
    size,
    to_data,
)
from cached.config import describe_settings, example_toml, load_config, process_environment
from cached.layout import LAYOUT
from cached.units import format_duration, format_rate, format_size
from cached_client._proto import cached_pb2 as pb
from cached_client._version import __version__ as client_version
from cached_client.connection import Connection
from cached_client.errors import CacheError, DaemonUnavailableError

_SERVICE = "cached.v1.CacheService"
_HEALTH_TIMEOUT_S = 10.0
_HEALTH_PAUSE_S = 0.2
_VERSION_TIMEOUT_S = 2.0
_REPLAY_PAUSE_S = 0.5
"""Remembered events come in one go: a pause this long is their end."""


@click.command()
@click.option("--trace", is_flag=True, help="Print the attaches that this host remembers instead, as CSV.")
@output_option
@pass_globals
def stats(options: Globals, trace: bool, output: str) -> None:
    """Show bytes at each level, and the counters that are not 0.

    HOT is what hot models have been promised, of what they may take. TRANSIENT is held beside the budget until its last
    leases end; it counts as used and as capacity meanwhile. UNVERIFIED is how long ago the blob that waits longest for
    the scrubber was last found right.

    With --trace: one line for each attach, the oldest first, as `cached simulate` reads it.

    \b
    Examples:
      cached stats -o json
      cached stats --trace > trace.csv
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        if trace:
            _print_trace(cache, output)
            return
        answer = cache.call(cache.stub.Stats, pb.StatsRequest())
    if output == "json":
        print_json(to_data(answer))
        return
    _print_levels(answer)
    click.echo()
    print_pairs(
        {
            "models": str(answer.model_count),
            "leases": str(answer.lease_count),
            "loads under way": str(answer.active_load_count),
            "movers": str(answer.mover_count),
            "scrubbing": _scrubbing(answer.scrub),
            "up for": format_duration(answer.uptime_s),
            "version": answer.version,
            "degraded": "; ".join(answer.degraded),
        }
    )
    _print_counters({name: value for name, value in answer.counters.items() if value})


def _print_levels(answer: pb.StatsResponse) -> None:
    columns = (
        "LEVEL", "CAPACITY", "USED", "RESERVED", "WITHDRAWN", "POOL", "TRANSIENT", "HOT", "BLOBS", "UNVERIFIED",
        "LIMITED BY",
    )  # fmt: skip
    rows = [
        (
            enum_word(level, "level").upper(),
            size(level.capacity_bytes),
            size(level.used_bytes),
            size(level.reserved_bytes),
            size(level.withdrawn_bytes),
            size(level.pool_bytes),
            size(level.transient_bytes),
            _hot(level),
            str(level.blob_count),
            format_duration(level.longest_unverified_s) if level.blob_count else "-",
            level.limited_by,
        )
        for level in answer.levels
    ]
    spare = ("RESERVED", "POOL", "BLOBS", "WITHDRAWN", "UNVERIFIED")
    print_table(columns, rows, right=columns[1:10], spare=spare, folding=("LIMITED BY",))


def _print_counters(counters: Mapping[str, float]) -> None:
    if not counters:
        return
    click.echo()
    shown = [
        (name, f"{value:,.0f}" if value.is_integer() else f"{value:,.3f}") for name, value in sorted(counters.items())
    ]
    print_table(("COUNTER", "VALUE"), shown, right=("VALUE",))


def _scrubbing(scrub: pb.Scrub) -> str:
    if not scrub.bytes_per_s:
        return "off"
    if not scrub.total_bytes:
        return "nothing is due"
    pace = "waiting for loads" if scrub.waiting else f"at most {format_rate(scrub.bytes_per_s)}"
    return f"{format_size(scrub.done_bytes)} of {format_size(scrub.total_bytes)}, {pace}"


def _hot(level: pb.LevelStats) -> str:
    if not level.hot_capacity_bytes:
        return "-"
    return f"{format_size(level.hot_bytes)} of {format_size(level.hot_capacity_bytes)}"


def _print_trace(cache: Connection, output: str) -> None:
    answers = cache.stream(cache.stub.Trace, pb.TraceRequest())
    if output == "json":
        print_json([to_data(row) for answer in answers for row in answer.rows])
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([field.name for field in pb.TraceRow.DESCRIPTOR.fields])
    for answer in answers:
        writer.writerows((f"{row.time_s:.3f}", row.model, row.size_bytes, f"{row.lease_s:.3f}") for row in answer.rows)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they happen, until interrupted.")
@output_option
@pass_globals
def events(options: Globals, follow: bool, output: str) -> None:
    """Show what happened lately, or happens now.

    As JSON, one object a line.

    Example: cached events --follow
    """
    with connected(options) as cache:
        cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_HEALTH_TIMEOUT_S)  # somebody answers
        answers = cache.stream(cache.stub.Watch, pb.WatchRequest(replay=True))
        for answer in answers if follow else _until_pause(cache, answers):
            _print_event(answer.event, output)


def _until_pause(cache: Connection, answers: Iterator[pb.WatchResponse]) -> Iterator[pb.WatchResponse]:
    """Answers until there is none for a while; then the connection is closed."""
    arrived: queue.SimpleQueue[pb.WatchResponse | CacheError | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for answer in answers:
                arrived.put(answer)
            arrived.put(None)
        except CacheError as error:
            arrived.put(error)

    reader = threading.Thread(target=read, name="cached-events", daemon=True)
    reader.start()
    try:
        while True:
            try:
                item = arrived.get(timeout=_REPLAY_PAUSE_S)
            except queue.Empty:
                return
            if isinstance(item, CacheError):
                raise item
            if item is None:
                return
            yield item
    finally:
        cache.close()
        reader.join()


def _print_event(event: pb.Event, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(to_data(event), ensure_ascii=False))
        return
    when = datetime.fromtimestamp(event.time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    named = f" {event.name}:" if event.name and event.name not in event.message else ""
    click.echo(f"{when}  {clean(event.kind):<16}{clean(named)} {clean(event.message)}")


@click.command()
@wait_option
@output_option
@pass_globals
def health(options: Globals, wait_s: float, output: str) -> int:
    """Ask whether the daemon serves, and what is degraded. Exit code 1 if it does not serve.

    Example: cached health --wait 30s
    """
    serving, degraded, target = _health_within(options, wait_s)
    if output == "json":
        print_json({"serving": serving, "degraded": degraded, "daemon": target})
    else:
        word = "serving" if serving else "not serving: starting or stopping"
        click.echo(f"{word} on {clean(target)}" + (", degraded" if degraded else ""))
        for reason in degraded:
            click.echo(f"  {clean(reason)}")
    return 0 if serving else FAILED


def _health_within(options: Globals, wait_s: float) -> tuple[bool, list[str], str]:
    """Asks until the daemon serves, or the time is over: then the last answer counts, and the last error."""
    deadline_s = time.monotonic() + wait_s
    while True:
        last = time.monotonic() >= deadline_s
        try:
            found = _health(options)
            if found[0] or last:
                return found
        except DaemonUnavailableError:
            if last:
                raise
        time.sleep(_HEALTH_PAUSE_S)


def _health(options: Globals) -> tuple[bool, list[str], str]:
    """Whether it serves, what is degraded, and where it answered."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with connected(options) as cache:
        stub: Any = health_pb2_grpc.HealthStub(cache.channel)
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        answer = cache.call(stub.Check, request, timeout_s=_HEALTH_TIMEOUT_S)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            return False, [], cache.target
        stats = cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_HEALTH_TIMEOUT_S)
        return True, list(stats.degraded), cache.target


@click.group()
def config() -> None:
    """Show the daemon's settings."""


_config_option = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="File to read, as `cached serve --config` would."
)


@config.command("show")
@_config_option
@output_option
def config_show(file: Path | None, output: str) -> None:
    """Show each setting with its value and where it comes from, as a daemon started here would have it.

    Example: cached config show
    """
    loaded = load_config(file, process_environment(), {})
    values = {
        item.key: getattr(getattr(loaded.config, item.key.split(".")[0]), item.key.split(".")[1])
        for item in describe_settings()
    }
    if output == "json":
        print_json({key: {"value": value, "origin": loaded.origin[key]} for key, value in values.items()})
        return
    print_table(
        ("SETTING", "VALUE", "FROM"), [(key, _shown(value), loaded.origin[key]) for key, value in values.items()]
    )


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@config.command("example")
def config_example() -> None:
    """Print a configuration file with every setting, commented out at its default.

    Example: cached config example > /etc/cached/config.toml
    """
    click.echo(example_toml(), nl=False)


@click.command()
@output_option
@pass_globals
def version(options: Globals, output: str) -> None:
    """Show the versions of the command, of what it speaks and stores, and of the daemon.

    The state layout is that of the state folder: a daemon reads layouts up to its own.

    Example: cached version
    """
    daemon = ""
    with connected(options) as cache:
        try:
            daemon = cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_VERSION_TIMEOUT_S).version
        except CacheError:
            daemon = ""  # it is no failure: there may be none on this host
        target = cache.target
    if output == "json":
        print_json(
            {
                "cached": __version__,
                "cached_client": client_version,
                "daemon": daemon or None,
                "python": platform.python_version(),
                "protocol": pb.DESCRIPTOR.package,
                "state_layout": LAYOUT,
            }
        )
        return
    print_pairs(
        {
            "cached": __version__,
            "cached-client": client_version,
            "python": f"{platform.python_version()}, {sys.executable}",
            "protocol": pb.DESCRIPTOR.package,
            "state layout": str(LAYOUT),
            "daemon": f"{daemon} on {target}" if daemon else f"none answers on {target}",
        }
    )
    if daemon and daemon != __version__:
        click.echo(f"the daemon still runs {daemon}: restart it for {__version__} (systemctl restart cached); L1 stays")
