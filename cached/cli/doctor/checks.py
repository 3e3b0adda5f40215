"""What a check is, what it is given, and what it finds. A new one is a function, and a line in ``registry.CHECKS``."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cached.cgroups import Cgroups
from cached.cli.connect import Globals
from cached.config import LoadedConfig, load_config
from cached.errors import CachedError
from cached.settings import Config, L1Config
from cached_client.errors import CacheError

_TOOL_TIMEOUT_S = 10.0


class Verdict(StrEnum):
    """How a check ends."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"
    NOT_MEASURED = "not measured"


class Group(StrEnum):
    """What checks are about."""

    HOST = "host"
    STORAGE = "storage"
    NETWORK = "network"
    GPU = "gpu"
    DAEMON = "daemon"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    ``told``: a sentence for people. ``measured``: figures by name, in the unit that ends the name. ``mend``: the
    command, or the line of configuration, that helps; empty where nothing is to be done.
    """

    verdict: Verdict
    told: str
    measured: Mapping[str, float] = field(default_factory=dict)
    mend: str = ""


def ok(told: str, **measured: float) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, told, measured)


def advice(told: str, mend: str, **measured: float) -> Finding:
    """It works, and would work better."""
    return Finding(Verdict.ADVICE, told, measured, mend)


def problem(told: str, mend: str, **measured: float) -> Finding:
    """It does not work, or will not for long."""
    return Finding(Verdict.PROBLEM, told, measured, mend)


def unseen(told: str, mend: str = "") -> Finding:
    """What could not be looked at, and why."""
    return Finding(Verdict.NOT_MEASURED, told, mend=mend)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who may or may not open a file."""

    name: str
    uid: int
    gids: frozenset[int]

    @classmethod
    def this(cls) -> User:
        """Whoever runs this process."""
        return cls(_user_name(os.geteuid()), os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))

    @classmethod
    def named(cls, name: str) -> User:
        """``name``, ``uid`` or ``uid:gid``. Raises KeyError for a user that this host does not know."""
        uid, _, gid = name.partition(":")
        if not uid.isdecimal():
            found = pwd.getpwnam(name)
            return cls(name, found.pw_uid, frozenset(os.getgrouplist(name, found.pw_gid)))
        if gid.isdecimal():
            return cls(name, int(uid), frozenset({int(gid)}))
        return cls.numbered(int(uid))

    @classmethod
    def numbered(cls, uid: int) -> User:
        """By its number; one that has no name here is in no group."""
        try:
            found = pwd.getpwuid(uid)
        except KeyError:
            return cls(str(uid), uid, frozenset())
        return cls(found.pw_name, uid, frozenset(os.getgrouplist(found.pw_name, found.pw_gid)))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Of a group, or its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def run_tool(command: Sequence[str]) -> str | None:
    """What a program of the system prints; None where it is not installed, fails or hangs."""
    try:
        done = subprocess.run(  # noqa: S603 - the callers' own words
            command,
            capture_output=True,
            text=True,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def default_settings() -> LoadedConfig:
    """Every setting as it is where nothing is said."""
    return LoadedConfig(Config(), {}, "")


@dataclass(frozen=True, slots=True)
class Context:
    """What checks are given. Everything about the host is read below ``proc`` and ``sys``, or told by ``tool``."""

    options: Globals
    socket: str
    python: str
    """The workers' interpreter."""
    environment: Mapping[str, str]
    """What workers are taken to be started with."""
    settings: LoadedConfig = field(default_factory=default_settings)
    refused: CachedError | None = None
    """Why the settings are not those of the file."""
    pid: int | None = None
    """Of the daemon that listens on the socket."""
    worker: User = field(default_factory=User.this)
    service: User = field(default_factory=User.this)
    """Whom the daemon runs as."""
    sources: tuple[str, ...] = ()
    """URIs to be looked at besides those of the catalog."""
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shm: Path = Path(L1Config().path)
    """Where segments are: ``l1.path``."""
    tool: Callable[[Sequence[str]], str | None] = run_tool

    @property
    def config(self) -> Config:
        """The settings."""
        return self.settings.config

    @property
    def process(self) -> str:
        """Below ``proc``: the daemon, if one is seen there, else this process."""
        return str(self.pid) if self.pid is not None and (self.proc / str(self.pid)).exists() else "self"

    @property
    def whose(self) -> str:
        """Whose limits are looked at, in words."""
        return f"the daemon's (pid {self.pid})" if self.process != "self" else "this process's"

    @property
    def cgroups(self) -> Cgroups:
        """Those of the daemon, else of this process."""
        return Cgroups(self.proc, self.sys, self.process)


def settings_for(
    file: Path | None, environment: Mapping[str, str], overrides: Mapping[str, str]
) -> tuple[LoadedConfig, CachedError | None]:
    """The settings, or the defaults and why those of the file, the environment and the flags cannot be used."""
    try:
        return load_config(file, environment, overrides), None
    except CachedError as error:
        kept = {name: value for name, value in environment.items() if not name.startswith("CACHED_")}
        return load_config(Path(os.devnull), kept, {}), error


@dataclass(frozen=True, slots=True)
class Check:
    """One check. ``experiment``: it runs something for seconds, instead of looking. ``details``: for the documents."""

    name: str
    about: str
    look: Callable[[Context], Iterable[Finding]]
    group: Group = Group.HOST
    experiment: bool = False
    details: str = ""


def run_checks(checks: Sequence[Check], context: Context) -> Iterator[tuple[Check, Finding]]:
    """Each finding as it is made. A check that cannot be carried out says why, and does not end the others."""
    for check in checks:
        try:
            for finding in check.look(context):
                yield check, finding
        except (OSError, ValueError, CachedError, CacheError) as error:
            told = error.message if isinstance(error, CachedError | CacheError) else str(error)
            yield check, unseen(f"this check could not be carried out: {told}")
