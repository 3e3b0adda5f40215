"""The command: chooses the checks, runs them, and prints what they found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cached.cli.connect import Globals, connected, pass_globals
from cached.cli.doctor.checks import Check, Context, Finding, Group, User, Verdict, run_checks, settings_for
from cached.cli.doctor.printing import Printer, as_data, summary
from cached.cli.doctor.registry import CHECKS
from cached.cli.failures import FAILED
from cached.cli.output import output_option, print_json, print_table
from cached.cli.serve import FLAGS as SERVE_FLAGS
from cached.config import flag_name, process_environment, take_environment

_NAMES = [*(group.value for group in Group), *(check.name for check in CHECKS if check.name not in set(Group))]
_SERVICE_USER = "cached"
_TAKEN = ("AWS_", "AZURE_", "CACHED_", "GOOGLE_", "HF_", "HUGGING_FACE_", "SSL_CERT_")
_TAKEN_NAMES = frozenset({"HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"})


def _user(_ctx: click.Context, _param: click.Parameter, value: str | None) -> User | None:
    try:
        return None if value is None else User.named(value)
    except KeyError:
        raise click.BadParameter(f"there is no user {value!r} here; numbers such as 1000:1000 will do") from None


@click.command()
@click.option(
    "--only", multiple=True, type=click.Choice(_NAMES), metavar="NAME", help="Only this check or group; repeatable."
)
@click.option("--skip", multiple=True, type=click.Choice(_NAMES), metavar="NAME", help="Leave this check or group out.")
@click.option("--list", "listing", is_flag=True, help="Print the checks and what they look at, and run none.")
@click.option("--quick", is_flag=True, help="Only look; leave out what runs experiments for seconds.")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="The daemon's configuration.  [/etc/cached/config.toml]"
)
@click.option(
    "--as-user", "worker", metavar="USER", callback=_user, help="Whose way to sockets and GPUs: NAME, UID or UID:GID."
)
@click.option("--source", "sources", multiple=True, metavar="URI", help="Look at this origin too; repeatable.")
@click.option(
    "--python", default=sys.executable, metavar="PATH", help="The workers' interpreter.  [default: this command's own]"
)
@output_option
@pass_globals
def doctor(
    options: Globals,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    listing: bool,
    quick: bool,
    file: Path | None,
    worker: User | None,
    sources: tuple[str, ...],
    python: str,
    output: str,
) -> int:
    """Look at this host, the daemon, its origins and how workers start, and tell what to mend. Exit code 1 if there is
    a problem, 0 if there is only advice.

    Works without a daemon too. As root it sees most: the daemon's environment with its credentials, and every folder;
    what this user may not look at is told as not measured. Nothing is changed. Experiments are bounded: 256 MiB of
    memory or disk, a second or two each. Origins are asked what a pull would ask, and for one byte.

    Checks of the group "worker" run in child processes with this command's environment. So start it as workers are
    started: as their user, with their environment, and with their interpreter. All of it needs half a minute.

    \b
    Examples:
      sudo cached doctor
      cached doctor --quick --skip worker
      cached doctor --only network --source s3://bucket/models
      cached doctor --only sockets --as-user 1000:1000
      cached doctor --python /opt/worker/bin/python --only worker -o json
    """  # noqa: D205, D301 click reads the control character
    chosen = [check for check in CHECKS if _is_chosen(check, only, skip) and not (quick and check.experiment)]
    if listing:
        _print_list(chosen, output)
        return 0
    context = _context(options, file, worker, sources, python)
    found: list[tuple[Check, Finding]] = []
    printer = Printer()
    from cached.cli.measure.scratch import ended_in_order

    with ended_in_order():
        for check, finding in run_checks(chosen, context):
            found.append((check, finding))
            if output == "table":
                printer.show(check, finding)
    if output == "json":
        print_json(as_data(found))
    else:
        click.echo(f"\n{summary(found)}")
    return FAILED if any(finding.verdict is Verdict.PROBLEM for _, finding in found) else 0


def _is_chosen(check: Check, only: tuple[str, ...], skip: tuple[str, ...]) -> bool:
    names = {check.name, check.group.value}
    return (not only or bool(names & set(only))) and not names & set(skip)


def _print_list(checks: list[Check], output: str) -> None:
    if output == "json":
        print_json(
            [
                {"check": item.name, "group": item.group, "about": item.about, "details": item.details,
                 "experiment": item.experiment}
                for item in checks
            ]
        )  # fmt: skip
        return
    rows = [(item.group.value, item.name, item.about, "yes" if item.experiment else "") for item in checks]
    print_table(("GROUP", "CHECK", "ABOUT", "EXPERIMENT"), rows, folding=("ABOUT",), spare=("EXPERIMENT",))


def _context(
    options: Globals, file: Path | None, worker: User | None, sources: tuple[str, ...], python: str
) -> Context:
    from cached.cli.doctor.daemons import flags, listener

    own = process_environment()
    settings, refused = settings_for(file, own, {})
    if options.socket or own.get("CACHED_SOCKET") or (file is None and not settings.file):
        with connected(options) as cache:
            socket = str(cache.path)
    else:
        socket = settings.config.daemon.socket
    there = listener(socket)
    if there.pid is not None:
        take_environment(_environment_of(there.pid))
        given = flags(there.pid)
        theirs = given.get("--config", "")
        file = file or (Path(theirs) if theirs and os.access(theirs, os.R_OK) else None)
        told = {key: given[flag] for key in SERVE_FLAGS.values() if (flag := flag_name(key)) in given}
        settings, refused = settings_for(file, process_environment(), told)
    return Context(
        Globals(socket),
        socket,
        python,
        own,
        settings=settings,
        refused=refused,
        pid=there.pid,
        worker=worker or User.this(),
        service=_service(there.uid),
        sources=sources,
        shm=Path(settings.config.l1.path),
    )


def _environment_of(pid: int | None) -> dict[str, str]:
    """Of the daemon, what origins and settings depend on; nothing where this user may not read it."""
    if pid is None:
        return {}
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition("=")[::2] for item in data.decode("utf-8", "replace").split("\0"))
    return {
        name: value
        for name, value in pairs
        if (name.startswith(_TAKEN) or name in _TAKEN_NAMES) and name != "CACHED_SOCKET"
    }


def _service(uid: int | None) -> User:
    """Whom the daemon runs as: as it does, else as the unit has it, else as whoever runs this."""
    if uid is not None:
        return User.numbered(uid)
    if os.geteuid() == 0:
        try:
            return User.named(_SERVICE_USER)
        except KeyError:
            pass
    return User.this()
