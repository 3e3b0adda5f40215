"""Every error a user of the cache can meet. Standard library only.

An error has a stable ``reason`` (also its name on the wire and in metrics), a message for people, a ``hint``: what to
do next, and typed ``fields``. It travels between processes as plain data (``to_dict``/``from_dict``), what it came of
included. What there is for each reason beside its type is in ``cached.failures``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

_MOST_CAUSES = 8
_CAUSE_CHARS = 500


class CachedError(Exception):
    """Base of all; ``fields`` maps names to text, so that it survives every transport."""

    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    """True where the same request may succeed a moment later without anybody mending anything."""

    def __init__(self, message: str, *, hint: str = "", **fields: object) -> None:
        message = encodable(message)
        super().__init__(message)
        self.message = message
        self.hint = encodable(hint)
        self.fields: dict[str, str] = {key: encodable(str(value)) for key, value in fields.items()}
        self.told = False
        """It was counted as a failure, and an event tells of it: many may meet the same error."""
        self._causes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message

    @property
    def causes(self) -> tuple[str, ...]:
        """What it came of, the nearest first; across processes, too. What a message says already is not there."""
        return tuple(_causes(self))

    @property
    def chain(self) -> str:
        """``a: because b: because c``, on one line."""
        return ": because ".join([_line(self.message), *self.causes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a pipe or a log."""
        return {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "fields": self.fields,
            "causes": list(self.causes),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CachedError:
        """The error of the right type again; an unknown reason becomes the base type."""
        kind = _BY_REASON.get(str(data["reason"]), CachedError)
        error = kind(str(data["message"]), hint=str(data["hint"]), **data["fields"])
        error._causes = tuple(str(cause) for cause in data.get("causes", ()))  # noqa: SLF001 - made here
        return error


def _causes(error: CachedError) -> Iterator[str]:
    """Only what was raised ``from``: what an exception happened beside is no cause, and may hold secrets."""
    said, found = error.message, 0
    link: BaseException | None = error
    while link is not None and found < _MOST_CAUSES:
        if isinstance(link, CachedError):
            yield from link._causes  # noqa: SLF001 - of this module
        link = link.__cause__
        # The client's errors, too, have a message apart from what their text says to do.
        text = _line(getattr(link, "message", "") or str(link)) if link is not None else ""
        if link is not None and (not text or text not in said):
            found += 1
            said += f"\n{text}"
            kind = type(link).__name__
            yield text if isinstance(link, CachedError) else f"{kind}: {text}" if text else kind


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs written out: JSON and file names may hold them, UTF-8 does not."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _line(text: str) -> str:
    line = " ".join(encodable(text).split())
    return line if len(line) <= _CAUSE_CHARS else f"{line[:_CAUSE_CHARS]}…"


class InvalidRequestError(CachedError):
    """The request itself is wrong: a bad name, reference, path, level or option. Field: ``value``."""

    reason = "INVALID_REQUEST"


class ConfigError(CachedError):
    """Configuration or catalog cannot be used. Fields: ``file``, ``key``, ``value``."""

    reason = "INVALID_CONFIG"


class NotFoundError(CachedError):
    """No such model, revision, lease or origin object. Fields: ``ref``, or ``uri`` and ``path``."""

    reason = "NOT_FOUND"


class NoSourceError(NotFoundError):
    """The model is not here, and nothing says where to pull it from. Field: ``ref``."""

    reason = "NO_SOURCE"


class BadFormatError(CachedError):
    """A file is not what its name says: no safetensors file, or no index of such. Fields: ``path``, ``tensor``."""

    reason = "BAD_FORMAT"


class NoRoomError(CachedError):
    """A level cannot hold the bytes, and what is there may not be evicted.

    Fields: ``level``, ``needed_bytes``, ``available_bytes``, ``capacity_bytes``, ``holders`` (who holds the bytes).
    """

    reason = "NO_ROOM"


class InUseError(CachedError):
    """Refused because workers hold leases on it, or it is pinned or hot. Fields: ``ref``, ``holders``."""

    reason = "IN_USE"


class IntegrityError(CachedError):
    """Bytes are not what they must be. Fields: ``name``, ``path``, ``check``, ``expected``, ``found``."""

    reason = "INTEGRITY"


class QuarantinedError(IntegrityError):
    """A revision is damaged and could not be mended. Fields: ``ref``, ``path``, ``offset_bytes``, ``length_bytes``."""

    reason = "QUARANTINED"


class OriginError(CachedError):
    """The origin could not serve. Fields: ``uri``, ``path``, ``cause``."""

    reason = "ORIGIN_FAILED"


class OriginUnavailableError(OriginError):
    """Unreachable, timed out, reset, throttled or 5xx: worth another try."""

    reason = "ORIGIN_UNAVAILABLE"
    retryable = True


class OriginDeniedError(OriginError):
    """Credentials are missing, expired, wrong, or do not allow this."""

    reason = "ORIGIN_DENIED"


class OriginProtocolError(OriginError):
    """The answer was not what was asked for: short body, wrong range or length. Worth another try, bounded."""

    reason = "ORIGIN_PROTOCOL"
    retryable = True


class ObjectChangedError(OriginError):
    """The object is no longer the version that the ingest began with. Fields: ``expected``, ``found`` versions."""

    reason = "OBJECT_CHANGED"


class LevelError(CachedError):
    """A level (shared memory or disk) failed to do I/O. Fields: ``level``, ``path``, ``cause``."""

    reason = "LEVEL_FAILED"


class MoverError(CachedError):
    """A mover process died or answered nonsense; its work goes to another one, a bounded number of times.

    Field ``raised``: it lives, and a job ended with an exception of this type that nobody foresaw.
    """

    reason = "MOVER_FAILED"
    retryable = True


class ClusterError(CachedError):
    """Kubernetes' API could not be asked, or refused. Nothing of the cache waits for it. Field: ``status``."""

    reason = "CLUSTER_FAILED"
    retryable = True


class TimeoutExpiredError(CachedError):
    """A deadline passed. Fields: ``what``, ``timeout_s``."""

    reason = "TIMED_OUT"


class UnavailableError(CachedError):
    """The daemon is starting, draining or not reachable; worth another try."""

    reason = "UNAVAILABLE"
    retryable = True


class PermissionDeniedError(CachedError):
    """The peer may not do this. Fields: ``uid``, ``gid``."""

    reason = "PERMISSION_DENIED"


class LimitExceededError(CachedError):
    """One more than a caller may have at the same time. Fields: ``limit``, ``setting``, ``caller``, ``allowed``."""

    reason = "LIMIT_EXCEEDED"
    retryable = True


class LocalOnlyError(CachedError):
    """Asked for over a network, and only had on the daemon's own host. Fields: ``method``, ``socket``."""

    reason = "LOCAL_ONLY"


class AlreadyRunningError(CachedError):
    """Another daemon holds the state folder or socket. Fields: ``path``, ``holder_pid``."""

    reason = "ALREADY_RUNNING"


def _subclasses(kind: type[CachedError]) -> list[type[CachedError]]:
    found = [kind]
    for child in kind.__subclasses__():
        found.extend(_subclasses(child))
    return found


_BY_REASON: dict[str, type[CachedError]] = {kind.reason: kind for kind in _subclasses(CachedError)}
"""Every reason with its type; complete because all errors are defined in this module."""


def all_errors() -> dict[str, type[CachedError]]:
    """Reason → type, for the RPC error table and the documents' test."""
    return dict(_BY_REASON)
