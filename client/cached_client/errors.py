"""Every error that the client raises: a `CacheError` of a kind that tells a worker what it can do about it.

Standard library only at import, because the header parser uses it inside the daemon too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import grpc

_STATUS_DETAILS = "grpc-status-details-bin"


class CacheError(Exception):
    """Base of every error of this package.

    Attributes:
        reason: a stable word in capitals, the same on the wire, in logs and in metrics.
        message: what happened, one sentence for people.
        hint: what to do next; may be empty.
        fields: the error's details by name, as text, e.g. ``path``, ``expected``, ``found``.
    """

    kind_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", reason: str = "", **fields: object) -> None:
        super().__init__(message)
        self.reason: str = reason or self.kind_reason
        self.message = message
        self.hint = hint
        self.fields: dict[str, str] = {key: str(value) for key, value in fields.items()}

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., CacheError], tuple[object, ...]]:
        """Errors cross process borders whole: engines send what a worker raised to the process that started it."""
        return _rebuild, (type(self), self.message, self.hint, self.reason, self.fields)


def _rebuild(kind: type[CacheError], message: str, hint: str, reason: str, fields: Mapping[str, str]) -> CacheError:
    error = kind(message, hint=hint, reason=reason)
    error.fields.update(fields)
    return error


class InvalidRequestError(CacheError):
    """The request itself is wrong: a bad name, reference, path or option. Field: ``value``."""

    kind_reason = "INVALID_REQUEST"


class NotFoundError(CacheError):
    """No such model, revision, file or tensor. Field: ``ref``, ``path`` or ``tensor``."""

    kind_reason = "NOT_FOUND"


class NoSourceError(NotFoundError):
    """The model is not on this host, and nothing says where to pull it from. Field: ``ref``."""

    kind_reason = "NO_SOURCE"


class NoRoomError(CacheError):
    """The host cannot hold the model, and what it holds may not be evicted.

    Fields: ``level``, ``needed_bytes``, ``available_bytes``, ``capacity_bytes``, ``holders`` (who holds the bytes).
    """

    kind_reason = "NO_ROOM"


class InUseError(CacheError):
    """Refused because workers hold leases on it, or it is pinned or hot. Fields: ``ref``, ``holders``."""

    kind_reason = "IN_USE"


class IntegrityError(CacheError):
    """Bytes are not what they must be. Fields: ``path``, ``expected``, ``found``, the range where it is known."""

    kind_reason = "INTEGRITY"


class QuarantinedError(IntegrityError):
    """A revision is damaged on this host and could not be mended. Fields: ``ref``, ``path``, the range."""

    kind_reason = "QUARANTINED"


class OriginError(CacheError):
    """The origin could not serve the model. Fields: ``uri``, ``path``, ``cause``."""

    kind_reason = "ORIGIN_FAILED"


class OriginUnavailableError(OriginError):
    """The origin is unreachable, throttles or answers 5xx: worth another try later."""

    kind_reason = "ORIGIN_UNAVAILABLE"


class OriginDeniedError(OriginError):
    """The daemon's credentials are missing, expired, wrong, or do not allow this."""

    kind_reason = "ORIGIN_DENIED"


class PermissionDeniedError(CacheError):
    """The daemon, or the mode of its socket, does not let this process in. Fields: ``uid``, ``gid`` or ``path``."""

    kind_reason = "PERMISSION_DENIED"


class LimitExceededError(CacheError):
    """More than this user may have at the same time. Fields: ``limit``, ``setting``, ``caller``, ``allowed``."""

    kind_reason = "LIMIT_EXCEEDED"


class TimeoutExpiredError(CacheError):
    """A time limit passed. Fields: ``what``, ``timeout_s``. What was waited for goes on in the daemon."""

    kind_reason = "TIMED_OUT"


class NotReadyError(CacheError):
    """The daemon answers, but is still starting or already draining: try again a moment later."""

    kind_reason = "UNAVAILABLE"


class DaemonUnavailableError(CacheError):
    """Nobody answers on the socket. Field: ``target``."""

    kind_reason = "DAEMON_UNAVAILABLE"


class LeaseLostError(CacheError):
    """The lease ended and cannot be taken up again. Field: ``ref``."""

    kind_reason = "LEASE_LOST"


class SuspendedError(CacheError):
    """The model is suspended: `resume` it first. Field: ``ref``."""

    kind_reason = "SUSPENDED"


class ChangedError(CacheError):
    """This process wrote to the model's bytes, and a suspension would lose that.

    Fields: ``path``, ``offset_bytes`` of the first page that was written to, ``tensors`` that lie in such pages.
    """

    kind_reason = "CHANGED"


class FormatError(CacheError):
    """A file is not valid safetensors, or a model's files contradict each other. Fields: ``path``, ``tensor``."""

    kind_reason = "BAD_FORMAT"


class UnsupportedDtypeError(CacheError):
    """The tensor is sound, but this library (torch, numpy) has no type for it. Fields: ``tensor``, ``dtype``."""

    kind_reason = "UNSUPPORTED_DTYPE"


class DeviceError(CacheError):
    """A device cannot be used, has no room, or failed during a copy. Fields: ``device``, ``cause``."""

    kind_reason = "DEVICE_FAILED"


class ArtifactError(CacheError):
    """A directory of compile artifacts cannot be read or written, or was changed meanwhile. Fields: ``path``."""

    kind_reason = "ARTIFACT_FAILED"


class WarmUpError(CacheError):
    """The warm-up failed, so the worker must not be called ready. Fields: ``shapes`` (which failed), ``cause``."""

    kind_reason = "WARM_UP_FAILED"


class EndpointError(CacheError):
    """A server that was asked over HTTP did not answer as it should. Fields: ``url``, ``status``, ``cause``."""

    kind_reason = "ENDPOINT_FAILED"


_KINDS: dict[str, type[CacheError]] = {
    kind.kind_reason: kind
    for kind in (
        CacheError, InvalidRequestError, NotFoundError, NoSourceError, NoRoomError, InUseError, IntegrityError,
        QuarantinedError, OriginError, OriginUnavailableError, OriginDeniedError, PermissionDeniedError,
        LimitExceededError, TimeoutExpiredError, NotReadyError, DaemonUnavailableError, LeaseLostError, FormatError,
        UnsupportedDtypeError,
    )
}  # fmt: skip
_KINDS |= {
    "INVALID_CONFIG": InvalidRequestError,
    "ORIGIN_PROTOCOL": OriginError,
    "OBJECT_CHANGED": OriginError,
}


def error_of_reason(
    reason: str, message: str, *, hint: str = "", fields: Mapping[str, str] | None = None
) -> CacheError:
    """The error of the kind that belongs to a daemon's ``reason``; an unknown reason becomes a plain `CacheError`."""
    error = _KINDS.get(reason, CacheError)(message, hint=hint, reason=reason)
    error.fields.update(fields or {})
    return error


def daemon_unavailable(target: str, cause: str) -> DaemonUnavailableError:
    """The error for a daemon that does not answer at ``target`` (the socket's path, or an address)."""
    hint = "see `systemctl status cached`, or start it with `cached serve`; CACHED_SOCKET names another socket"
    if not target.startswith("/"):
        hint = "it must have tcp.listen set, trust your certificate by tcp.client_ca, and show one that --tls-ca trusts"
    return DaemonUnavailableError(f"the cache daemon does not answer on {target}: {cause}", hint=hint, target=target)


def from_rpc_error(error: grpc.RpcError | grpc.Call, target: str) -> CacheError:
    """Translates what a call raised or ended with. ``target``, a path or an address, is named when nobody answers.

    The daemon's own errors carry google.rpc.ErrorInfo: its reason chooses the kind, and its metadata becomes ``hint``
    and ``fields``. Errors of the transport have only a status code.
    """
    import grpc

    if not isinstance(error, grpc.Call):
        return CacheError(f"the call failed: {error}")
    code, details = error.code(), error.details() or ""
    info = _error_info(error)
    if info is not None:
        reason, fields = info
        return error_of_reason(reason, details, hint=fields.pop("hint", ""), fields=fields)
    if code.name in _BROKEN_STATUS:
        return daemon_unavailable(target, details or code.name)
    if code.name == "DEADLINE_EXCEEDED":
        hint = "what was begun goes on in the daemon: `cached ls` shows how far it is"
        return error_of_reason("TIMED_OUT", "no answer within the time limit", hint=hint, fields={"status": code.name})
    reason = _REASON_OF_STATUS.get(code.name, CacheError.kind_reason)
    return error_of_reason(reason, details or f"the call failed with {code.name}", fields={"status": code.name})


# How a connection ends when nobody chose to end the call: the daemon died, was stopped, or was never there.
_BROKEN_STATUS = frozenset({"UNAVAILABLE", "CANCELLED", "UNKNOWN"})

_REASON_OF_STATUS = {
    "INVALID_ARGUMENT": "INVALID_REQUEST",
    "NOT_FOUND": "NOT_FOUND",
    "RESOURCE_EXHAUSTED": "LIMIT_EXCEEDED",  # said by gRPC itself: a message too large, or too many calls in all
    "FAILED_PRECONDITION": "IN_USE",
    "DATA_LOSS": "INTEGRITY",
    "PERMISSION_DENIED": "PERMISSION_DENIED",
    "UNAUTHENTICATED": "PERMISSION_DENIED",
}


def _error_info(call: grpc.Call) -> tuple[str, dict[str, str]] | None:
    """Reason and metadata of the first google.rpc.ErrorInfo that the call ended with."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    for key, value in call.trailing_metadata() or ():
        if key != _STATUS_DETAILS or not isinstance(value, bytes):
            continue
        try:
            details = status_pb2.Status.FromString(value).details
        except DecodeError:
            return None  # not written by our daemon: the status code still tells the kind
        for detail in details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return info.reason, dict(info.metadata)
    return None
