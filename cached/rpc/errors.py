"""The one table from errors to gRPC status, and how an error travels: google.rpc.Status with ErrorInfo."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from cached import errors

DOMAIN = "cached.v1"
DETAILS_KEY = "grpc-status-details-bin"
# gRPC refuses trailers above 8 KiB in all; the message travels twice (percent-encoded once) besides the fields.
_MESSAGE_LIMIT = 1024
_FIELD_LIMIT = 512
_FIELDS_LIMIT = 4096

_Code = grpc.StatusCode
STATUS: dict[type[errors.CachedError], grpc.StatusCode] = {
    errors.CachedError: _Code.INTERNAL,
    errors.InvalidRequestError: _Code.INVALID_ARGUMENT,
    errors.ConfigError: _Code.FAILED_PRECONDITION,
    errors.NotFoundError: _Code.NOT_FOUND,
    errors.NoSourceError: _Code.NOT_FOUND,
    errors.BadFormatError: _Code.FAILED_PRECONDITION,
    errors.NoRoomError: _Code.RESOURCE_EXHAUSTED,
    errors.InUseError: _Code.FAILED_PRECONDITION,
    errors.IntegrityError: _Code.DATA_LOSS,
    errors.QuarantinedError: _Code.DATA_LOSS,
    errors.OriginError: _Code.FAILED_PRECONDITION,
    errors.OriginUnavailableError: _Code.UNAVAILABLE,
    # Not PERMISSION_DENIED: it is the daemon that was refused, not the caller.
    errors.OriginDeniedError: _Code.FAILED_PRECONDITION,
    errors.OriginProtocolError: _Code.UNAVAILABLE,
    errors.ObjectChangedError: _Code.ABORTED,
    errors.LevelError: _Code.INTERNAL,
    errors.MoverError: _Code.UNAVAILABLE,
    errors.TimeoutExpiredError: _Code.DEADLINE_EXCEEDED,
    errors.UnavailableError: _Code.UNAVAILABLE,
    errors.PermissionDeniedError: _Code.PERMISSION_DENIED,
    errors.LimitExceededError: _Code.RESOURCE_EXHAUSTED,
    errors.LocalOnlyError: _Code.FAILED_PRECONDITION,
    errors.AlreadyRunningError: _Code.FAILED_PRECONDITION,
}
"""Complete: a test compares it with ``cached.errors.all_errors``."""


def status_code(error: errors.CachedError) -> grpc.StatusCode:
    """The status of an error; a type unknown to the table has that of its nearest base."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def to_status(error: errors.CachedError) -> status_pb2.Status:
    """The error with its reason, fields and hint; long texts are cut so that the trailers stay within gRPC's limit."""
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason)
    left = _FIELDS_LIMIT
    for key, value in [("hint", error.hint), *error.fields.items()]:
        text = _clean(value, min(_FIELD_LIMIT, left))
        if not text:
            continue
        info.metadata[key] = text
        left -= len(text.encode()) + len(key)
    status = status_pb2.Status(code=_number(status_code(error)), message=_clean(error.message, _MESSAGE_LIMIT))
    status.details.add().Pack(info)
    return status


def internal_error() -> errors.CachedError:
    """What a caller sees of an exception that nobody foresaw: nothing of it."""
    return errors.CachedError("an internal error", hint="look in the daemon's log for the traceback, and report it")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.CachedError) -> NoReturn:
    """Ends the RPC with the error's status and details."""
    status = to_status(error)
    await context.abort(status_code(error), status.message, ((DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError  # abort always raises


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _clean(text: str, limit_bytes: int) -> str:
    """Valid UTF-8 of at most ``limit_bytes``, with an ellipsis where it was cut."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: max(0, limit_bytes - 3)].decode("utf-8", "ignore") + "…" if limit_bytes >= 3 else ""
