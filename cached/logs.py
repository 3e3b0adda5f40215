"""Logging: structlog events as JSON lines or, on a terminal, as text; the standard library's loggers go the same way.

Everything goes to one text stream (standard error by default). Values whose name or shape says that they are secret are
replaced before they are rendered.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

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
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # The plain formatters: the rich ones print local variables, and with them secrets.
    final: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        redact,
    ]
    if as_json:
        final.append(structlog.processors.JSONRenderer(default=str))
    else:
        plain = structlog.dev.plain_traceback
        final.append(structlog.dev.ConsoleRenderer(colors=output.isatty(), exception_formatter=plain))
    handler = logging.StreamHandler(output)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.INFO) if number < logging.INFO else max(number, logging.WARNING))
    logging.getLogger("cached").setLevel(number)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replaces values under secret names, and user information and signatures inside any text."""
    for key, value in event.items():
        event[key] = _redacted(key, value)
    return event


def _redacted(key: str, value: object) -> object:
    if _SECRET_NAME.search(key):
        return REDACTED
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), item) for name, item in value.items()}
    return [_redacted(key, item) for item in value] if isinstance(value, list | tuple) else value


def redact_text(text: str) -> str:
    """``s3://key:secret@host/…`` and signed queries without their secrets."""
    return _SIGNED_QUERY.sub(rf"\g<1>{REDACTED}", _URI_USERINFO.sub(f"{REDACTED}@", text))
