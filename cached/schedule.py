"""Weekly windows during which a model is hot: ``mon-fri 08:00-20:00 Europe/Berlin``. Pure: the time is given.

Times of day are those that a clock on the wall shows. Where the clocks go forward, a time that is skipped means the
moment they do; where they go back, a window begins at the first and ends at the second of two equal times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TIME: Final = re.compile(r"(\d{1,2}):(\d{2})")
_DAY_MINUTES: Final = 24 * 60
_RIGHT: Final = "write a window such as 'mon-fri 08:00-20:00', 'sat,sun 22:00-06:00' or '08:00-20:00 Europe/Berlin'"


class WindowError(ValueError):
    """A text that is no window: ``wrong`` says what is wrong in it, ``right`` what would be right."""

    def __init__(self, text: str, wrong: str) -> None:
        super().__init__(f"the window {text!r} {wrong}: {_RIGHT}")
        self.wrong = wrong
        self.right = _RIGHT


@dataclass(frozen=True, slots=True)
class Window:
    """Begins at ``begin_minute`` of each of ``days`` (0 is Monday); one whose end is not later ends on the next day.

    ``zone`` is a name of the IANA database.
    """

    days: frozenset[int]
    begin_minute: int
    end_minute: int
    zone: str

    def spans(self, around: datetime) -> Iterable[tuple[float, float]]:
        """Begin and end, in Unix time, of those that begin from two days before ``around`` to eight days after it."""
        zone = zone_info(self.zone)
        midnight = around.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
        for offset in range(-2, 9):
            day = midnight + timedelta(days=offset)
            if day.weekday() in self.days:
                after_midnight = self.end_minute <= self.begin_minute
                end = day + timedelta(minutes=self.end_minute, days=1 if after_midnight else 0)
                begin_s = _instant(day + timedelta(minutes=self.begin_minute), zone, fold=0)
                end_s = _instant(end, zone, fold=1)
                if begin_s < end_s:  # a window may lie wholly within the hour that is skipped
                    yield begin_s, end_s


@dataclass(frozen=True, slots=True)
class Schedule:
    """Windows together; without any, never hot. All times are Unix times."""

    windows: tuple[Window, ...] = ()

    def is_hot(self, now_s: float) -> bool:
        """Within a window now."""
        return any(begin_s <= now_s < end_s for begin_s, end_s in self._spans(now_s))

    def next_start(self, now_s: float) -> float | None:
        """When it becomes hot the next time, from not being so; None without windows, or when it always is."""
        begins = (begin_s for begin_s, _ in self._spans(now_s) if begin_s > now_s)
        return min((begin_s for begin_s in begins if not self.is_hot(begin_s - 1e-3)), default=None)

    def hot_until(self, now_s: float) -> float | None:
        """When the window that it is in now ends; None outside of one. Windows that meet are one."""
        until_s = None
        for begin_s, end_s in sorted(self._spans(now_s)):
            reached_s = now_s if until_s is None else until_s
            if begin_s <= reached_s < end_s:
                until_s = end_s
        return until_s

    def next_change(self, now_s: float) -> float | None:
        """When it begins or ends to be hot the next time; None without windows.

        Of a schedule that is always hot it is some days ahead, when nothing changes.
        """
        until_s = self.hot_until(now_s)
        return self.next_start(now_s) if until_s is None else until_s

    def _spans(self, now_s: float) -> list[tuple[float, float]]:
        around = datetime.fromtimestamp(now_s, UTC)
        return [span for window in self.windows for span in window.spans(around)]


LEAD_FACTOR: Final = 1.5
LEAD_S: Final = 30.0
"""A prefetch begins this much earlier than the measured load time says: loads vary, and being late costs everything."""


def lead_s(load_s: float) -> float:
    """How long before its time a load that takes ``load_s`` begins."""
    return LEAD_FACTOR * load_s + LEAD_S


def parse_schedule(texts: Iterable[str], default_zone: str = "UTC") -> Schedule:
    """Windows from their texts. Raises WindowError for one that is none."""
    return Schedule(tuple(parse_window(text, default_zone) for text in texts))


def parse_window(text: str, default_zone: str = "UTC") -> Window:
    """``[days] HH:MM-HH:MM [zone]``. Raises WindowError."""
    words = text.split()
    if not words:
        raise _wrong(text, "is empty")
    times_at = next((index for index, word in enumerate(words) if ":" in word), None)
    if times_at is None:
        raise _wrong(text, "has no times")
    if times_at > 1 or len(words) > times_at + 2:
        raise _wrong(text, f"has a word too many: {words[0] if times_at > 1 else words[-1]!r}")
    begin_minute, end_minute = _minutes(text, words[times_at])
    return Window(
        days=_days(text, words[0]) if times_at else frozenset(range(7)),
        begin_minute=begin_minute,
        end_minute=end_minute,
        zone=_zone(text, words[times_at + 1] if len(words) > times_at + 1 else default_zone),
    )


def _days(text: str, word: str) -> frozenset[int]:
    days: set[int] = set()
    for part in word.lower().split(","):
        first, dash, last = part.partition("-")
        for name in (first, last) if dash else (first,):
            if name not in DAYS:
                raise _wrong(text, f"names no day with {name!r}; days are {', '.join(DAYS)}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(days)


def _minutes(text: str, word: str) -> tuple[int, int]:
    begin, dash, end = word.partition("-")
    if not dash:
        raise _wrong(text, f"has no end: {word!r}")
    minutes = _minute(text, begin), _minute(text, end)
    if minutes[0] == _DAY_MINUTES:
        raise _wrong(text, "begins at 24:00; that is 00:00 of the next day")
    if minutes[0] == minutes[1]:
        raise _wrong(text, "ends when it begins; a whole day is 00:00-24:00")
    return minutes


def _minute(text: str, word: str) -> int:
    match = _TIME.fullmatch(word)
    minute = int(match[1]) * 60 + int(match[2]) if match else -1
    if match is None or int(match[2]) > 59 or minute > _DAY_MINUTES:
        raise _wrong(text, f"has {word!r} where a time from 00:00 to 24:00 belongs")
    return minute


def _zone(text: str, name: str) -> str:
    if not is_zone(name):
        raise _wrong(text, f"names no time zone with {name!r}; zones are called 'Europe/Berlin' or 'UTC'")
    return name


def is_zone(name: str) -> bool:
    """Whether this host knows a time zone of this name."""
    try:
        zone_info(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def zone_info(name: str) -> tzinfo:
    """UTC is there even where the host has no database of zones."""
    return UTC if name == "UTC" else ZoneInfo(name)


def _wrong(text: str, what: str) -> WindowError:
    return WindowError(text, what)


def _instant(local: datetime, zone: tzinfo, *, fold: int) -> float:
    """The Unix time at which a clock shows this; one that it never shows is the moment at which it jumps over it."""
    before = local.replace(tzinfo=zone, fold=0)
    after = local.replace(tzinfo=zone, fold=1)
    offset_before, offset_after = before.utcoffset(), after.utcoffset()
    if offset_before is not None and offset_after is not None and offset_after > offset_before:
        return _jump(local, zone, offset_before, offset_after)
    return (after if fold else before).timestamp()


def _jump(local: datetime, zone: tzinfo, before: timedelta, after: timedelta) -> float:
    """The first moment of the later offset: between the two readings of a time that no clock shows."""
    early = int((local - after).replace(tzinfo=UTC).timestamp())
    late = int((local - before).replace(tzinfo=UTC).timestamp())
    while early < late:
        middle = (early + late) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == before:
            early = middle + 1
        else:
            late = middle
    return float(early)
