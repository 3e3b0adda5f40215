"""The alert rules: PromQL that parses, over metrics and labels that /metrics has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from cached.metrics import METRICS
from tests.docs.documents import ROOT, text_of

RULES = ROOT / "deploy/prometheus/alerts.yaml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def nodes(expression: Any) -> Iterator[Any]:
    yield expression
    for name in ("lhs", "rhs", "expr", "args", "vector_selector"):
        below = getattr(expression, name, None)
        for item in below if isinstance(below, list) else [below]:
            if item is not None:
                yield from nodes(item)


def labels_of() -> dict[str, set[str]]:
    """Every series name, with its labels."""
    found: dict[str, set[str]] = {}
    for info in METRICS:
        for suffix in ("_bucket", "_count", "_sum") if info.type == "histogram" else ("",):
            found[info.name + suffix] = {*info.labels, *(["le"] if suffix == "_bucket" else [])}
    for rule in rules():
        if "record" in rule:
            found[rule["record"]] = {"model", "phase"}
    return found


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_parses_and_speaks_of_what_there_is(rule):
    known = labels_of()
    parsed = list(nodes(promql_parser.parse(rule["expr"])))
    selectors = [node for node in parsed if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    labels: set[str] = set()
    for node in selectors:
        assert node.name in known
        labels |= known[node.name] | {"instance", "job"}
        assert {matcher.name for matcher in node.matchers.matchers} <= known[node.name]
    for node in parsed:
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            assert set(modifier.labels) <= labels


def test_operations_say_what_to_do_about_each_alert():
    text = text_of("docs/operations.md")
    assert [rule["alert"] for rule in rules() if "alert" in rule and f"`{rule['alert']}`" not in text] == []


def test_alerts_say_what_is_wrong_and_how_bad():
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert {"summary", "description"} <= rule["annotations"].keys()
