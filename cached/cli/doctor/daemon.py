"""Checks of the daemon: whether it answers and is well, its sockets, its settings, its catalog and its folders."""

from __future__ import annotations

import errno
import os
import re
import stat
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from cached import __version__
from cached.cache.capacity import l1_budget
from cached.catalog_file import load_catalog
from cached.cli.connect import connected
from cached.cli.doctor.access import may, obstacle
from cached.cli.doctor.checks import Context, Finding, User, advice, group_name, ok, problem, unseen
from cached.cli.doctor.daemons import TIMEOUT_S, flags, listener, sockets_in_use
from cached.errors import ConfigError
from cached.rpc.sockets import descriptor_socket_path
from cached.setting_checks import resolve_capacity
from cached.signatures import KEYS_SETTING, check_of
from cached.units import format_size
from cached_client._proto import cached_pb2 as pb
from cached_client.errors import CacheError

_CALLS = 5
_START = "systemctl start cached   (or: cached serve)"
_STOP_MARGIN_S = 10.0
"""What the daemon takes to close after it has drained."""
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def daemon(context: Context) -> Iterator[Finding]:
    """Whether it answers, how fast, of which version, and whether all is well with it."""
    times_ms: list[float] = []
    nobody = listener(context.socket).error
    if nobody is not None and not isinstance(nobody, PermissionError):
        yield problem(f"no daemon on {context.socket}: {nobody.strerror or nobody}", _START)
        yield from _others(context)
        return
    with connected(context.options) as cache:
        try:
            for _ in range(_CALLS):
                began_s = time.perf_counter()
                stats = cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=TIMEOUT_S)
                times_ms.append(1000 * (time.perf_counter() - began_s))
        except CacheError as error:
            yield problem(error.message, error.hint or _START)
            yield from _others(context)
            return
    call_ms = statistics.median(times_ms)
    if not stats.degraded:
        yield ok(f"version {stats.version} answers on {context.socket} in {call_ms:.1f} ms", call_ms=call_ms)
    for reason in stats.degraded:
        yield problem(f"the daemon is degraded: {reason}", "cached health", call_ms=call_ms)
    if stats.version != __version__:
        told = f"the daemon is of version {stats.version}, this command of {__version__}"
        yield advice(f"{told}: 0.x versions are not promised to work together", "systemctl restart cached")
    for level in stats.levels:
        if level.level == pb.LEVEL_L1 and not level.limited_by.startswith("configured"):
            told = f"L1 has {format_size(level.capacity_bytes)} now, less than configured: {level.limited_by}"
            yield advice(told, "cached stats", capacity_bytes=float(level.capacity_bytes))
    yield from _others(context)


def _others(context: Context) -> Iterator[Finding]:
    """A second daemon has a budget of its own, and this one does not know of it."""
    others = [path for path in sockets_in_use(context.proc) if path != os.path.realpath(context.socket)]
    if others:
        told = f"other daemons listen here, each with its own budget: {', '.join(others)}"
        yield advice(told, f"cached --socket {others[0]} stats", daemons=float(len(others)))


def sockets(context: Context) -> Iterator[Finding]:
    """Whether workers may use both of them, nobody who should not, and somebody listens."""
    for path in (context.socket, descriptor_socket_path(context.socket)):
        try:
            found = os.stat(path)
        except PermissionError:
            yield unseen(f"{path} is in a folder that {User.this().name} may not enter", "sudo cached doctor")
            continue
        except OSError as error:
            if path == context.socket:
                yield unseen(f"{path}: {error.strerror}; with a daemon there are two sockets to look at")
                return
            yield problem(
                f"{path}: {error.strerror}; workers fetch their descriptors there", "systemctl restart cached"
            )
            continue
        yield _socket(context, path, found)


def _socket(context: Context, path: str, found: os.stat_result) -> Finding:
    mode, group, user = f"{stat.S_IMODE(found.st_mode):04o}", group_name(found.st_gid), context.worker
    told = f"{path} has mode {mode} and group {group}"
    if not stat.S_ISSOCK(found.st_mode):
        return problem(f"{path} is not a socket", f"rm {path} && systemctl restart cached")
    closed = obstacle(user, path, os.R_OK | os.W_OK)
    if closed == path:
        return problem(f"{told}: {user.name} may not use it", f"usermod -aG {group} {user.name}   (then log in anew)")
    if closed:
        place = os.stat(closed)
        told += f", but {user.name} may not enter {closed} (mode {stat.S_IMODE(place.st_mode):04o}, "
        owners = group_name(place.st_gid)
        return problem(f"{told}group {owners})", f"usermod -aG {owners} {user.name}   (then log in anew)")
    error = listener(path).error
    if error is not None and error.errno == errno.ECONNREFUSED:
        return problem(f"{path} was left by a daemon that is gone: nobody listens", _START)
    if found.st_mode & stat.S_IWOTH:
        return advice(f"{told}: every user of this host may use it", 'access.socket_mode = "0660"')
    return ok(f"{told}: {user.name} may use it")


def settings(context: Context) -> Iterator[Finding]:
    """Whether the settings can be used, are those of the running daemon, and fit this host and its unit."""
    if context.refused is not None:
        yield problem(f"{context.refused.message} (looked at with the defaults from here on)", context.refused.hint)
        return
    file = context.settings.file
    yield from _of_the_daemon(context, file)
    yield from _l2_fits(context)
    yield from _unit_fits(context)
    yield ok(f"settings of {file}" if file else "settings are the defaults and the environment's: no file is read")


def _of_the_daemon(context: Context, file: str) -> Iterator[Finding]:
    theirs = flags(context.pid, context.proc).get("--config", "")
    if theirs and os.path.abspath(theirs) != os.path.abspath(file or "/"):
        told = f"the daemon (pid {context.pid}) was started with --config {theirs}, this looks at {file or 'defaults'}"
        yield advice(told, f"cached doctor --config {theirs}   (as a user who may read it)")


def _l2_fits(context: Context) -> Iterator[Finding]:
    l2 = context.config.l2
    if not l2.enabled or l2.capacity.endswith("%"):
        return
    sizes = {}
    for folder in l2.folders:
        place = nearest(folder)
        found = os.statvfs(place)
        sizes[os.stat(place).st_dev] = found.f_blocks * found.f_frsize
    total_bytes, wanted_bytes = sum(sizes.values()), resolve_capacity(l2.capacity, 0)
    if wanted_bytes > total_bytes:
        told = f"l2.capacity is {l2.capacity}, and its file systems have {format_size(total_bytes)}"
        yield problem(told, 'l2.capacity = "80%"', wanted_bytes=float(wanted_bytes), total_bytes=float(total_bytes))


def _unit_fits(context: Context) -> Iterator[Finding]:
    """What systemd does to the daemon, where it runs it."""
    text = context.tool(["systemctl", "show", "cached.service", "-p", "LoadState,TimeoutStopUSec,MemoryMax,RemoveIPC"])
    unit = dict(line.partition("=")[::2] for line in (text or "").splitlines())
    if unit.get("LoadState") != "loaded":
        return
    drain_s, stop_s = context.config.daemon.drain_timeout_s, seconds(unit.get("TimeoutStopUSec", ""))
    if stop_s is not None and stop_s < drain_s + _STOP_MARGIN_S:
        told = f"a stopping daemon drains for {drain_s:g} s, and systemd kills it after {stop_s:g} s (TimeoutStopSec)"
        mend = f"systemctl edit cached, [Service] TimeoutStopSec={drain_s + 2 * _STOP_MARGIN_S:g}"
        yield problem(told, mend, drain_s=drain_s, stop_s=stop_s)
    if unit.get("RemoveIPC") == "yes":
        yield problem(
            "systemd removes L1 when the daemon stops (RemoveIPC)", "systemctl edit cached, [Service] RemoveIPC=no"
        )
    limit, budget_bytes = unit.get("MemoryMax", ""), l1_budget(context.config.l1.capacity, context.proc).size_bytes
    if limit.isdecimal() and int(limit) < budget_bytes:
        told = f"the unit's MemoryMax is {format_size(int(limit))}, L1 wants {format_size(budget_bytes)}"
        yield problem(told, "systemctl edit cached, [Service] MemoryMax=infinity")


def seconds(text: str) -> float | None:
    """``1min 30s`` as systemctl prints it; None for ``infinity`` and what is no duration."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(us|ms|s|min|h|d)\b", text)
    return sum(float(value) * _SECONDS[unit] for value, unit in parts) if parts else None


def catalog(context: Context) -> Iterator[Finding]:
    """Whether the catalog can be used, and read by the daemon."""
    file = context.config.daemon.catalog
    if not file:
        yield ok("no catalog: models are those that are asked for by URI")
        return
    try:
        closed = obstacle(context.service, file, os.R_OK)
        found = load_catalog(Path(file), check_of(context.config.catalog.public_keys, Path(file)))
    except ConfigError as error:
        is_signature = error.fields["key"] == KEYS_SETTING
        yield problem(error.message, error.hint if is_signature else f"cached catalog validate {file}")
        return
    except OSError as error:
        yield problem(f"{file}: {error.strerror}", "daemon.catalog = the right path")
        return
    if closed:
        yield problem(f"{context.service.name} may not read {closed}", f"chmod a+rX {closed}")
    else:
        yield ok(f"{file} names {len(found.models)} models", models=float(len(found.models)))


def state(context: Context) -> Iterator[Finding]:
    """Whether the daemon may write to its folders, and nobody else reads them."""
    folder = context.config.daemon.state_dir
    try:
        found = os.stat(folder)
    except PermissionError:
        yield unseen(f"{folder} cannot be looked at as {User.this().name}", "sudo cached doctor --only state")
        return
    except FileNotFoundError:
        place = nearest(folder)
        if may(context.service, place, os.W_OK | os.X_OK):
            yield ok(f"{folder} is not there yet; {context.service.name} may make it")
        else:
            mend = f"install -d -m 0700 -o {context.service.name} {folder}"
            yield problem(f"{folder} is not there, and {context.service.name} may not make it in {place}", mend)
        return
    mode = stat.S_IMODE(found.st_mode)
    if not may(context.service, folder, os.R_OK | os.W_OK | os.X_OK):
        yield problem(f"{context.service.name} may not write to {folder}", f"chown {context.service.name} {folder}")
    elif mode & 0o022:
        yield problem(f"others may write to {folder} (mode {mode:04o})", f"chmod 0700 {folder}")
    else:
        yield ok(f"{folder}: mode {mode:04o}, {context.service.name} may write to it")


def nearest(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
