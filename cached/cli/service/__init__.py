"""`cached install-service` and `uninstall-service`: the daemon as a service of systemd."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from cached.cli.service.files import (
    CONFIG_FILE,
    DISTRIBUTION_PREFIX,
    LOCAL_PREFIX,
    MOUNT,
    UNIT,
    USER,
    Kind,
    service_files,
)
from cached.cli.service.host import Change, Host, is_active, run
from cached.cli.service.reach import needed_paths, obstacles
from cached.errors import InvalidRequestError, NotFoundError

_DONE = {"write": "written", "replace": "replaced", "keep": "kept, it was edited", "nothing": "as it should be"}
_WOULD = _DONE | {"write": "would be written", "replace": "would be replaced"}

_root_option = click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False),
    callback=lambda _context, _option, folder: folder or "",
    metavar="DIR",
    help="Install into this folder, the root of an image, instead of this host.",
)
_prefix_option = click.option(
    "--prefix",
    type=click.Choice([LOCAL_PREFIX, DISTRIBUTION_PREFIX]),
    default=LOCAL_PREFIX,
    show_default=True,
    help="Where the unit goes: below lib/ of /usr/local, or of /usr as packages of a distribution do.",
)
_dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


@click.command("install-service")
@_root_option
@_prefix_option
@click.option("--program", default="", metavar="PATH", help="The command for the unit to start.  [this one]")
@click.option(
    "--l1-mount", default="", metavar="SIZE", help="Give L1 a tmpfs of its own, such as 400GiB or 60% of the memory."
)
@click.option("--enable", is_flag=True, help="Also start it, now and at each boot.")
@_dry_run_option
@click.option("--print", "print_files", is_flag=True, help="Print the files, and do nothing.")
def install_service(
    root: str, prefix: str, program: str, l1_mount: str, enable: bool, dry_run: bool, print_files: bool
) -> None:
    """Install the daemon as a service of systemd: unit, user, and a configuration to edit. For root.

    Files go below /usr/local/lib, so that /etc stays yours: `systemctl edit cached` and `systemctl mask cached` work
    as for any service. A configuration that is there is never written over. Doing it again after an upgrade is safe,
    and does nothing where nothing changed.

    \b
    Examples:
      sudo /opt/cached/bin/cached install-service --enable
      cached install-service --dry-run
      cached install-service --root /srv/image --prefix /usr --program /usr/bin/cached
    """  # noqa: D301 click reads the control character
    files = service_files(program=program or _own_program(), prefix=prefix, l1_mount=l1_mount)
    if print_files:
        click.echo("\n".join(f"# {file.path}\n{file.text}" for file in files), nl=False)
        return
    host = Host(root)
    if not dry_run:
        host.require("install a service")
    if not root:
        _check_reach(program or _own_program())
    changes = [host.change(file) for file in files]
    for change in changes:
        if change.writes and not dry_run:
            host.write(change.file)
        _tell(change, dry_run=dry_run)
    for path in host.shadows(UNIT, prefix):
        click.echo(f"careful: systemd takes {path} instead; remove it if it is an older installation")
    commands = _commands(host, changes, enable=enable)
    for command in commands:
        _do(command, dry_run=dry_run)
    if not commands and not any(change.writes for change in changes):
        click.echo("nothing to do")
    elif not dry_run:
        _next_steps(changes, root, enable=enable)


@click.command("uninstall-service")
@_root_option
@_prefix_option
@_dry_run_option
def uninstall_service(root: str, prefix: str, dry_run: bool) -> None:
    """Stop the service and take its unit away. Configuration, cached models and the user stay. For root.

    Example: sudo cached uninstall-service
    """
    host = Host(root)
    files = service_files(program="/usr/bin/cached", prefix=prefix, l1_mount="50%")
    there = [file for file in files if file.kind is not Kind.CONFIGURATION and host.path(file.path).is_file()]
    if not there:
        raise NotFoundError(
            f"the service is not installed below {root}{prefix}",
            hint="was it installed with another --prefix or --root? `systemctl cat cached` shows where a unit is",
            ref=UNIT,
        )
    if not dry_run:
        host.require("remove a service")
    units = [name for name in (UNIT, MOUNT) if any(Path(file.path).name == name for file in there)]
    disable = host.systemctl("disable", *([] if root else ["--now"]), *units)
    _do(disable, dry_run=dry_run)
    for file in there:
        click.echo(f"{'would be removed' if dry_run else 'removed'}: {file.path}")
        if not dry_run:
            host.remove(file)
    if not root:
        _do(host.systemctl("daemon-reload"), dry_run=dry_run)
    click.echo("left as it is: /etc/cached, /var/lib/cached, /run/cached, /dev/shm/cached.*, and the user cached.")
    click.echo("to remove that too: rm -r /etc/cached /var/lib/cached /run/cached /dev/shm/cached.*; userdel cached")


def _own_program() -> str:
    """Where this command is installed: beside its interpreter, else wherever the shell found it."""
    beside = Path(sys.executable).parent / "cached"
    found = str(beside) if beside.is_file() else shutil.which(sys.argv[0])
    if not found:
        raise InvalidRequestError(
            "cannot tell where the command cached is installed", hint="name it: --program PATH", value=sys.argv[0]
        )
    return os.path.abspath(found)


def _check_reach(program: str) -> None:
    """Raises InvalidRequestError where the service's user could not run what is installed."""
    paths = needed_paths(program) if program == _own_program() else (Path(program),)
    problems = list(dict.fromkeys(problem for path in paths for problem in obstacles(path)))
    if problems:
        raise InvalidRequestError(
            "the service's user cannot run this installation:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint="install it where all users may read, with an interpreter of the system, and run it from there: "
            "/usr/bin/python3 -m venv /opt/cached && /opt/cached/bin/pip install ./client . (in a checkout, or the two "
            "wheels) && /opt/cached/bin/cached install-service",
            value=program,
        )


def _commands(host: Host, changes: list[Change], *, enable: bool) -> list[list[str]]:
    """What systemd has to be told, if anything."""
    commands, units = [], [change for change in changes if change.file.kind is Kind.UNIT]
    for change in changes:
        if change.file.kind is Kind.USER and (change.writes or not host.has_user(USER)):
            commands.append(host.sysusers(change.file.path))
        if change.file.kind is Kind.TEMPORARY and change.writes:
            commands.append(host.tmpfiles(change.file.path))
    if any(change.writes for change in units) and not host.root:
        commands.append(host.systemctl("daemon-reload"))
    if enable and not _is_enabled(host):
        mounts = [MOUNT for change in units if change.file.path.endswith(f"/{MOUNT}")]
        commands.append(host.systemctl("enable", *([] if host.root else ["--now"]), *mounts, UNIT))
    return commands


def _is_enabled(host: Host) -> bool:
    """Whether it is started at boot, and on this host runs."""
    linked = host.path(f"/etc/systemd/system/multi-user.target.wants/{UNIT}").is_symlink()
    return linked and (bool(host.root) or is_active(UNIT))


def _tell(change: Change, *, dry_run: bool) -> None:
    click.echo(f"{(_WOULD if dry_run else _DONE)[change.word]}: {change.file.path}")
    for line in change.diff.splitlines()[2:]:
        click.echo(f"    {line}")


def _do(command: list[str], *, dry_run: bool) -> None:
    click.echo(f"{'would run' if dry_run else 'running'}: {' '.join(command)}")
    if not dry_run:
        run(command)


def _next_steps(changes: list[Change], root: str, *, enable: bool) -> None:
    if any(change.writes and change.file.path == CONFIG_FILE for change in changes):
        click.echo(f"next: set at least daemon.catalog and l1.capacity in {CONFIG_FILE}")
    replaced = any(change.word == "replace" for change in changes)
    if replaced and not root and is_active(UNIT):
        click.echo("next: systemctl restart cached (workers keep their weights, and L1 stays)")
    elif not enable:
        click.echo(f"next: systemctl {f'--root={root} ' if root else ''}enable {'' if root else '--now '}cached")
    click.echo("workers that may use it: usermod -aG cached WORKER")
