from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from cached.policy import predict
from cached.policy.predict import SLOT_S, Prediction, Predictor

MONDAY = datetime(2026, 11, 2, tzinfo=UTC)


def at(day: int, hour: float) -> float:
    return (MONDAY + timedelta(days=day, hours=hour)).timestamp()


def weekdays_at_nine(weeks: int) -> Predictor:
    predictor = Predictor()
    for day in range(7 * weeks):
        if day % 7 < 5:
            predictor.used("office", at(day, 9.1))
    return predictor


def names(predictions: tuple[Prediction, ...]) -> list[str]:
    return [prediction.name for prediction in predictions]


def test_a_model_used_every_weekday_at_nine_is_expected_at_nine() -> None:
    predictor = weekdays_at_nine(1)
    assert predictor.due(at(7, 9.0)) == (Prediction("office", at(7, 9.0), 1.0),)
    assert predictor.due(at(7, 8.4)) == ()
    assert predictor.due(at(7, 9.5)) == ()


def test_not_at_the_weekend() -> None:
    predictor = weekdays_at_nine(3)
    assert predictor.due(at(26, 9.0)) == ()  # a Saturday
    assert names(predictor.due(at(21, 9.0))) == ["office"]


def test_as_early_as_its_load_takes() -> None:
    predictor = weekdays_at_nine(1)
    assert names(predictor.due(at(7, 8.9), {"office": 1000.0})) == ["office"]
    assert predictor.due(at(7, 8.9), {"other": 1000.0}) == ()


def test_every_friday_is_a_habit_too() -> None:
    predictor = Predictor()
    for week in range(3):
        predictor.used("weekly", at(7 * week + 4, 16.0))
    assert names(predictor.due(at(25, 16.0))) == ["weekly"]
    assert predictor.due(at(24, 16.0)) == ()


def test_twice_is_no_habit_and_neither_is_now_and_then() -> None:
    predictor = Predictor()
    predictor.used("twice", at(0, 9.0))
    predictor.used("twice", at(1, 9.0))
    for day in (0, 2, 4):
        predictor.used("now and then", at(day, 9.0))
    assert predictor.due(at(2, 9.0)) == ()
    assert names(predictor.due(at(7, 9.0))) == []


def test_habits_are_forgotten() -> None:
    predictor = weekdays_at_nine(2)
    for day in range(14, 60):
        predictor.used("office", at(day, 15.0))
    assert predictor.due(at(63, 9.0)) == ()
    assert names(predictor.due(at(63, 15.0))) == ["office"]


def test_predictions_are_judged_and_pay_once_enough_came_true() -> None:
    predictor = weekdays_at_nine(1)
    assert (predictor.precision, predictor.pays) == (None, False)
    for week in (1, 2):
        for day in range(5):
            predictor.due(at(7 * week + day, 9.0))
            predictor.due(at(7 * week + day, 9.05))  # asked twice, judged once
            predictor.used("office", at(7 * week + day, 9.1))
    predictor.due(at(21, 0.0))
    assert predictor.precision == 1.0
    assert predictor.pays
    assert 9.0 < predictor.right <= 10.0


def test_they_switch_themselves_off_when_they_do_not_pay() -> None:
    predictor = weekdays_at_nine(4)
    predictor.right = 10.0
    assert predictor.pays
    for day in range(28, 33):
        for half_hour in range(48):  # nobody comes any more, while a habit of each half hour is claimed
            predictor.used(f"m{half_hour}", at(day, 0.0))
        predictor.due(at(day, 9.0))
    predictor._open |= {(f"ghost{number}", at(32, 9.0)): False for number in range(10)}
    predictor.due(at(34, 9.0))
    assert predictor.precision is not None
    assert predictor.precision < 0.6
    assert not predictor.pays


def test_a_use_before_the_prediction_was_asked_for_counts() -> None:
    predictor = weekdays_at_nine(1)
    predictor.used("office", at(7, 9.1))
    predictor.due(at(7, 9.2))
    predictor.due(at(7, 10.0))
    assert predictor.precision == 1.0


def test_a_use_after_the_slot_does_not() -> None:
    predictor = weekdays_at_nine(1)
    predictor.due(at(7, 9.0))
    predictor.used("office", at(7, 9.0) + SLOT_S)
    predictor.due(at(7, 10.0))
    assert predictor.precision == 0.0


def test_times_are_those_of_the_zone() -> None:
    predictor = Predictor("Europe/Berlin")
    for day in range(20, 25):  # Berlin's clocks go back on 2026-10-25
        predictor.used("office", datetime(2026, 10, day, 7, 10, tzinfo=UTC).timestamp())
    assert names(predictor.due(datetime(2026, 10, 26, 8, 10, tzinfo=UTC).timestamp())) == ["office"]
    assert predictor.due(datetime(2026, 10, 26, 7, 10, tzinfo=UTC).timestamp()) == ()


def test_the_models_that_were_used_last_are_kept_and_what_is_removed_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(predict, "MODELS", 3)
    predictor = weekdays_at_nine(1)
    predictor.due(at(7, 9.0))
    predictor.used("a", at(7, 9.1))
    predictor.used("office", at(7, 9.1))
    predictor.used("b", at(7, 9.2))
    predictor.used("c", at(7, 9.3))
    assert set(predictor.to_records()["models"]) == {"office", "b", "c"}
    predictor.forget("office")
    predictor.forget("unknown")
    predictor.due(at(7, 10.0))
    assert predictor.precision is None, "what was expected of it is not judged"
    assert predictor.due(at(8, 9.0)) == ()
    records = predictor.to_records()
    monkeypatch.setattr(predict, "MODELS", 1)
    assert set(Predictor.from_records(records).to_records()["models"]) == {"c"}


def test_habits_survive_as_plain_data() -> None:
    predictor = weekdays_at_nine(1)
    predictor.due(at(7, 9.0))
    predictor.due(at(8, 9.0))
    again = Predictor.from_records(json.loads(json.dumps(predictor.to_records())))
    assert again.precision == predictor.precision == 0.0
    assert names(again.due(at(8, 9.0))) == ["office"]
