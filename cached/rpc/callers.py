"""Who is behind each connection to the socket, as the kernel said when it was accepted (SO_PEERCRED)."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from cached.access import Caller
from cached.errors import LimitExceededError, PermissionDeniedError
from cached.open_files import HINT, SETTING
from cached.types import Peer

_PREFIX = "unix-abstract:"
_TOLD = 16
"""Connections beyond the limit that are taken nevertheless, to tell why their calls are refused."""

_current: ContextVar[Caller] = ContextVar("caller")


def caller_of(peer: Peer, groups: tuple[int, ...]) -> Caller:
    """The caller that the kernel names. Root and the daemon's own user are operators: the files are theirs."""
    return Caller(f"uid {peer.uid}", peer.uid, frozenset({peer.gid, *groups}), peer.uid in {0, os.geteuid()})


def current_caller() -> Caller:
    """Whose call this is. Only within a call."""
    return _current.get()


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Around a call: `current_caller` says whose it is."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(slots=True)
class _Connection:
    caller: Caller
    is_extra: bool


class Callers:
    """The connections that are open now, by the name that gRPC has for their inner end. Loop only."""

    def __init__(self, *, per_uid: int, in_all: int) -> None:
        """Where the limit of open files is for few connections, one user still leaves an eighth of them to others."""
        self._setting = "" if per_uid <= in_all - in_all // 8 else SETTING
        self._per_uid = min(per_uid, in_all - in_all // 8)
        self._told = min(_TOLD, (in_all - self._per_uid) // 2)
        self._in_all = in_all
        self._connections: dict[str, _Connection] = {}
        self._counts: Counter[str] = Counter()

    def come(self, caller: Caller) -> str:
        """Takes a connection in, and says what its inner end is to be called. Raises LimitExceededError."""
        others = self._counts[caller.name]
        if others >= self._per_uid + self._told or len(self._connections) >= self._in_all:
            raise self._too_many(caller)
        name = f"cached-{secrets.token_hex(16)}"
        self._connections[name] = _Connection(caller, is_extra=others >= self._per_uid)
        self._counts[caller.name] += 1
        return name

    def gone(self, name: str) -> None:
        """The connection is about to be closed: from now on its name says nothing."""
        caller = self._connections.pop(name).caller
        self._counts[caller.name] -= 1
        if not self._counts[caller.name]:
            del self._counts[caller.name]

    def of(self, peer: str) -> Caller:
        """Who is behind the connection that gRPC calls ``peer``.

        Raises PermissionDeniedError for one that did not come through the front, LimitExceededError for one too many.
        """
        found = self._connections.get(peer.removeprefix(_PREFIX)) if peer.startswith(_PREFIX) else None
        if found is None:
            raise PermissionDeniedError("nobody knows who makes this call", hint="connect to the daemon's socket")
        if found.is_extra:
            if self._counts[found.caller.name] > self._per_uid:
                raise self._too_many(found.caller)
            found.is_extra = False
        return found.caller

    def used_ratios(self) -> dict[str, float]:
        """How far each limit is used; that of each user by the one who has the most."""
        most = max(self._counts.values(), default=0)
        return {"connections": most / self._per_uid, "all_connections": len(self._connections) / self._in_all}

    def _too_many(self, caller: Caller) -> LimitExceededError:
        if self._counts[caller.name] >= self._per_uid:
            return exceeded("connections", caller, self._per_uid, self._setting)
        return LimitExceededError(
            f"the daemon has {len(self._connections)} connections, all that its limit of open files is for",
            hint=HINT, limit="connections", setting=SETTING, caller=caller.name, allowed=self._in_all,
        )  # fmt: skip


def exceeded(what: str, caller: Caller, allowed: int, setting: str = "") -> LimitExceededError:
    """The error for one more of something than a caller may have. ``setting``: what bounds it, if not its own."""
    setting = setting or f"limits.{what.replace(' ', '_')}_per_uid"
    return LimitExceededError(
        f"{caller.name} has {allowed} {what}, and may have no more",
        hint=f"close some, or let the operator raise {setting}",
        limit=what, setting=setting, caller=caller.name, allowed=allowed,
    )  # fmt: skip
