"""Logging: structlog events as JSON lines or, on a terminal, as text; the standard library's loggers go the same way.

Everything goes to one text stream (standard error by default). Values whose name or shape says that they are secret are
replaced before they are rendered.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from cached.tracing import current_trace_id

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")
REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:token|secret|password|passwd|authorization|credentials?|signature|(?:access|api|private)[_-]?key)"
    r"(?:$|[_-])",
    re.IGNORECASE,
)
_URI_USERINFO = re.compile(r"(?<=://)[^/\s@]*@")
_SIGNED_QUERY = re.compile(
    r"((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|GoogleAccessId|sig|"
    r"(?:access_|auth_)?token|api_?key|secret|password)(?:=|%3D))[^&\s'\"]+",
    re.IGNORECASE,
)


def configure(level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Sets up logging for the whole process; the last call wins. Call once, before the first event.

    ``log_format`` ``auto`` is ``console`` on a terminal and ``json`` elsewhere. Loggers of other packages never go
    below info: their debug events show request headers.
    """
    output = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not output.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        of_trace,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # The plain formatters: the rich ones print local variables, and with them secrets.
    final: list[Processor] = [structlog.processors.format_exc_info, redact]
    if as_json:
        final.append(structlog.processors.JSONRenderer(default=str))
    else:
        plain = structlog.dev.plain_traceback
        final.append(structlog.dev.ConsoleRenderer(colors=output.isatty(), exception_formatter=plain))
    handler = logging.StreamHandler(output)
    unwrap = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[unwrap, *final]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.INFO) if number < logging.INFO else max(number, logging.WARNING))
    logging.getLogger("cached").setLevel(number)
    logging.captureWarnings(True)
    structlog.configure(
        # Straight to the stream: the standard library's loggers in between cost more than all the rest.
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *names: _Lines(output, *names),
        cache_logger_on_first_use=False,
    )


class _Lines(structlog.WriteLogger):
    """Writes what is rendered already, a line each."""

    def __init__(self, stream: TextIO, name: str = "cached") -> None:
        super().__init__(stream)
        self.name = name

    def msg(self, message: str) -> None:
        """A log that cannot be written, to a full disk, say, fails nobody: as in the standard library."""
        with suppress(OSError, ValueError):
            super().msg(message)

    debug = info = warning = error = critical = msg


def of_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Adds the trace that the event is a part of."""
    if trace_id := current_trace_id():
        event.setdefault("trace_id", trace_id)
    return event


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replaces values under secret names, and user information and signatures inside any text."""
    for key, value in event.items():
        event[key] = _redacted(key, value)
    return event


@lru_cache
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def _redacted(key: str, value: object) -> object:
    if _is_secret(key):
        return REDACTED
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), item) for name, item in value.items()}
    return [_redacted(key, item) for item in value] if isinstance(value, list | tuple) else value


def redact_text(text: str) -> str:
    """``s3://key:secret@host/…`` and signed queries without their secrets."""
    # Most texts have nothing of the kind, and every event has many: to look for the signs is far cheaper.
    if "@" in text:
        text = _URI_USERINFO.sub(f"{REDACTED}@", text)
    if "=" in text or "%3" in text:
        text = _SIGNED_QUERY.sub(rf"\g<1>{REDACTED}", text)
    return text
