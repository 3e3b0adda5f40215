from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from cached.schedule import LEAD_FACTOR, LEAD_S, Schedule, lead_s, parse_schedule, parse_window

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: str = "Europe/Berlin", fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def utc(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_office_hours() -> None:
    hours = parse_schedule(["mon-fri 08:00-20:00 Europe/Berlin"])
    assert not hours.is_hot(at("2026-11-20 07:59:59"))
    assert hours.is_hot(at("2026-11-20 08:00"))  # a Friday
    assert hours.is_hot(at("2026-11-20 19:59:59"))
    assert not hours.is_hot(at("2026-11-20 20:00"))
    assert not hours.is_hot(at("2026-11-21 12:00"))
    assert hours.next_start(at("2026-11-20 12:00")) == at("2026-11-23 08:00")
    assert hours.next_start(at("2026-11-23 07:59:59")) == at("2026-11-23 08:00")
    assert hours.hot_until(at("2026-11-20 12:00")) == at("2026-11-20 20:00")
    assert hours.hot_until(at("2026-11-21 12:00")) is None


def test_without_windows_nothing_is_hot() -> None:
    assert not Schedule().is_hot(0.0)
    assert Schedule().next_start(0.0) is None


def test_a_window_may_cross_midnight_and_belongs_to_the_day_it_begins_on() -> None:
    night = parse_schedule(["fri 22:00-06:00"])
    assert night.is_hot(utc("2026-11-20 23:00"))
    assert night.is_hot(utc("2026-11-21 05:59"))
    assert not night.is_hot(utc("2026-11-21 06:00"))
    assert not night.is_hot(utc("2026-11-20 05:00"))
    assert not night.is_hot(utc("2026-11-21 23:00"))


def test_days_may_be_listed_and_wrap_around_the_week() -> None:
    assert parse_window("sat-mon 10:00-11:00").days == {5, 6, 0}
    assert parse_window("mon,wed-thu 10:00-11:00").days == {0, 2, 3}
    assert parse_window("10:00-24:00").days == set(range(7))
    assert parse_window("10:00-24:00").end_minute == 1440


def test_several_windows_together() -> None:
    both = parse_schedule(["08:00-12:00", "12:00-13:00", "18:00-19:00"])
    assert both.is_hot(utc("2026-11-20 12:30"))
    assert both.next_start(utc("2026-11-20 09:00")) == utc(
        "2026-11-20 18:00"
    )  # 12:00 starts nothing: it is hot already
    assert both.hot_until(utc("2026-11-20 09:00")) == utc("2026-11-20 13:00")
    always = parse_schedule(["00:00-24:00"])
    assert always.is_hot(utc("2026-11-20 00:00"))
    assert always.next_start(utc("2026-11-20 09:00")) is None


def test_where_the_clocks_go_forward_a_skipped_time_is_the_moment_they_do() -> None:
    """In Berlin 2026-03-29 02:00 to 03:00 does not exist: 01:00 UTC is the moment."""
    begins = parse_schedule(["02:30-06:00 Europe/Berlin"])
    assert begins.next_start(utc("2026-03-29 00:00")) == utc("2026-03-29 01:00")
    assert begins.is_hot(utc("2026-03-29 03:59"))
    assert not begins.is_hot(utc("2026-03-29 04:00"))
    ends = parse_schedule(["01:00-02:30 Europe/Berlin"])
    assert ends.hot_until(utc("2026-03-29 00:30")) == utc("2026-03-29 01:00")
    within = parse_schedule(["02:15-02:45 Europe/Berlin"])
    assert within.next_start(utc("2026-03-29 00:00")) == at("2026-03-30 02:15")
    assert begins.next_start(utc("2026-03-29 12:00")) == utc("2026-03-30 00:30")


def test_where_the_clocks_go_back_a_window_has_both_of_two_equal_hours() -> None:
    """In Berlin 2026-10-25 02:00 to 03:00 comes twice: at 00:00 and at 01:00 UTC."""
    twice = parse_schedule(["02:15-02:45 Europe/Berlin"])
    assert twice.next_start(utc("2026-10-24 22:00")) == utc("2026-10-25 00:15")
    assert twice.hot_until(utc("2026-10-25 00:30")) == utc("2026-10-25 01:45")
    assert parse_schedule(["08:00-09:00 Europe/Berlin"]).next_start(utc("2026-10-24 12:00")) == utc("2026-10-25 07:00")


def test_the_zone_decides_what_a_day_is() -> None:
    tokyo = parse_schedule(["sat 08:00-09:00 Asia/Tokyo"])
    assert tokyo.is_hot(utc("2026-11-20 23:30"))  # Saturday morning there
    assert parse_schedule(["sat 08:00-09:00"], "Asia/Tokyo") == tokyo


def test_a_load_begins_earlier_than_its_measured_time_says() -> None:
    assert lead_s(0.0) == LEAD_S > 0
    assert lead_s(100.0) == LEAD_FACTOR * 100.0 + LEAD_S > 100.0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("mon-fri", "has no times"),
        ("mon-fry 08:00-20:00", "names no day with 'fry'"),
        ("mon, 08:00-20:00", "names no day with ''"),
        ("08:00", "has no end: '08:00'"),
        ("8-20", "has no times"),
        ("08:60-20:00", "has '08:60' where a time"),
        ("08:00-24:01", "has '24:01' where a time"),
        ("08:00-8pm:", "has '8pm:' where a time"),
        ("24:00-08:00", "begins at 24:00"),
        ("08:00-08:00", "ends when it begins"),
        ("08:00-20:00 Europe/Bärlin", "names no time zone with 'Europe/Bärlin'"),
        ("08:00-20:00 ../../etc/passwd", "names no time zone"),
        ("08:00-20:00 Europe/Berlin please", "has a word too many: 'please'"),
        ("every mon 08:00-20:00", "has a word too many: 'every'"),
    ],
)
def test_what_is_wrong_is_named(text: str, what: str) -> None:
    with pytest.raises(ValueError, match="write a window such as") as caught:
        parse_schedule([text])
    assert what in str(caught.value)
    assert repr(text) in str(caught.value)


def test_the_next_change_is_a_beginning_or_an_end() -> None:
    hours = parse_schedule(["fri 08:00-12:00", "fri 12:00-20:00"])
    assert hours.next_change(utc("2026-11-20 07:00")) == utc("2026-11-20 08:00")
    assert hours.next_change(utc("2026-11-20 08:00")) == utc("2026-11-20 20:00")
    assert hours.next_change(utc("2026-11-20 20:00")) == utc("2026-11-27 08:00")
    assert Schedule().next_change(0.0) is None
    now_s = utc("2026-11-20 20:00")
    assert (parse_schedule(["00:00-24:00"]).next_change(now_s) or 0) > now_s
