from __future__ import annotations

import time
from datetime import datetime
from math import inf
from zoneinfo import ZoneInfo

import pytest

from cached.cli.when import parse_when, told
from cached.errors import InvalidRequestError

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture(autouse=True)
def in_berlin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


NOW = "2026-11-21T10:00:00"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("11:00", "2026-11-21T11:00"),
        ("9:30", "2026-11-22T09:30"),
        ("10:00", "2026-11-22T10:00"),
        ("+2h", "2026-11-21T12:00"),
        ("+90", "2026-11-21T10:01:30"),
        ("2026-11-22T08:00", "2026-11-22T08:00"),
        ("2026-11-22 08:00", "2026-11-22T08:00"),
        ("2026-11-22T08:00+00:00", "2026-11-22T09:00"),
        ("2026-11-22T08:00Z", "2026-11-22T09:00"),
    ],
)
def test_times_that_are_meant(text: str, meant: str) -> None:
    assert parse_when(text, berlin(NOW).astimezone()) == berlin(meant).timestamp()


def test_a_time_of_day_is_on_the_clock_also_when_the_clocks_are_changed() -> None:
    before = berlin("2026-10-24T12:00").astimezone()  # they go back in the night
    assert parse_when("11:00", before) == berlin("2026-10-25T11:00").timestamp()


def test_never() -> None:
    assert parse_when("never", berlin(NOW).astimezone()) == inf


@pytest.mark.parametrize(
    "text", ["", "soon", "25:00", "11:60", "+", "+2 fortnights", "-2h", "2026-13-01", "+999999999999d"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_when(text, berlin(NOW).astimezone())
    assert "is not a time" in caught.value.message
    assert "08:00" in caught.value.hint


@pytest.mark.parametrize(("text", "ago"), [("2026-11-20T10:00", "24h00m"), ("+0", "0 ms"), ("2026-11-21", "10h00m")])
def test_what_has_passed_is_refused(text: str, ago: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_when(text, berlin(NOW).astimezone())
    assert caught.value.message == f"{text!r} was {ago} ago"


def test_it_is_told_in_the_zone_of_the_host() -> None:
    assert told(berlin("2026-11-22T08:00").timestamp(), berlin(NOW)) == "2026-11-22 08:00:00 CET, in 22h00m"
