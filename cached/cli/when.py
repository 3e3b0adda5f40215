"""Points in time as people write them: ``08:00``, ``2026-11-22T08:00``, ``+2h``, ``never``."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from math import inf

from cached.errors import InvalidRequestError
from cached.units import format_duration, parse_duration

NEVER = "never"
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})")
_HINT = "write a time such as 08:00, 2026-11-22T08:00 (of this host, or with an offset: +01:00), +2h, or never"


def parse_when(text: str, now: datetime) -> float:
    """The Unix time that is meant, from ``now`` (with its zone) on; infinity for ``never``.

    Raises InvalidRequestError for what is no time, and for one that has passed.
    """
    if text == NEVER:
        return inf
    try:
        at = _parsed(text, now)
    except (ValueError, OverflowError):
        raise InvalidRequestError(f"{text!r} is not a time", hint=_HINT, value=text) from None
    if at <= now:
        ago = format_duration((now - at).total_seconds())
        raise InvalidRequestError(f"{text!r} was {ago} ago", hint="give a time that is yet to come", value=text)
    return at.timestamp()


def _parsed(text: str, now: datetime) -> datetime:
    if text.startswith("+"):
        return now + timedelta(seconds=parse_duration(text[1:]))
    if match := _CLOCK.fullmatch(text):
        # Without its zone: a day later the clock shows the same, whatever was done to it meanwhile.
        at = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0, tzinfo=None)
        return _local(at) if _local(at) > now else _local(at + timedelta(days=1))
    at = datetime.fromisoformat(text)
    return _local(at) if at.tzinfo is None else at


def _local(at: datetime) -> datetime:
    """What a clock of this host means."""
    return at.astimezone()


def told(at_time_s: float, now: datetime) -> str:
    """``2026-11-22 08:00:00 CET, in 2h13m``."""
    at = datetime.fromtimestamp(at_time_s).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S %Z}, in {format_duration(at_time_s - now.timestamp())}"
