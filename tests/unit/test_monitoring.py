"""Alert rules and dashboard: PromQL that parses, over metrics and labels that /metrics has; alerts that fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import promql_parser
import pytest
import yaml

from cached.errors import all_errors
from cached.metrics import METRICS
from cached.metrics.table import PULL_OUTCOMES
from tests.docs.documents import ROOT, anchors, section, text_of

RULES = ROOT / "deploy/prometheus/alerts.yaml"
RULE_TESTS = sorted((ROOT / "deploy/prometheus").glob("*.test.yaml"))
DASHBOARD = ROOT / "deploy/grafana/cached.json"
OF_THE_SCRAPE = {"instance", "job"}
OF_PROMETHEUS = {"up": OF_THE_SCRAPE}
OF_THE_LIBRARY = {
    f"process_{name}"
    for name in ("cpu_seconds_total", "max_fds", "open_fds", "resident_memory_bytes", "start_time_seconds")
}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[dict[str, Any]]:
    return dashboard()["panels"]


def dashboard_queries() -> list[str]:
    """As Grafana would send them, with everything chosen."""
    found = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return [re.sub(r"\$__(rate_interval|range)", "5m", re.sub(r"\$(job|instance|model)", ".*", expr)) for expr in found]


def nodes(expression: Any) -> Iterator[Any]:
    yield expression
    for name in ("lhs", "rhs", "expr", "args", "vector_selector"):
        below = getattr(expression, name, None)
        for item in below if isinstance(below, list) else [below]:
            if item is not None:
                yield from nodes(item)


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Name and labels of each series that is asked for."""
    for node in nodes(promql_parser.parse(expression)):
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name or "", {matcher.name for matcher in node.matchers.matchers}


def labels_of() -> dict[str, set[str]]:
    """Every series name, with its labels."""
    found = {name: set(labels) for name, labels in OF_PROMETHEUS.items()} | {name: set() for name in OF_THE_LIBRARY}
    for info in METRICS:
        for suffix in ("_bucket", "_count", "_sum") if info.type == "histogram" else ("",):
            found[info.name + suffix] = {*info.labels, *(["le"] if suffix == "_bucket" else [])}
    for rule in rules():
        if "record" in rule:
            found[rule["record"]] = {"model", "phase"}
    return found


def check_expression(expression: str) -> None:
    known = labels_of()
    parsed = list(nodes(promql_parser.parse(expression)))
    labels: set[str] = set()
    assert list(selectors(expression))
    for name, asked in selectors(expression):
        assert name in known
        assert asked <= known[name] | OF_THE_SCRAPE
        labels |= known[name] | OF_THE_SCRAPE
    for node in parsed:
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.AggregateExpr) and modifier is not None:
            assert set(modifier.labels) <= labels


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_parses_and_speaks_of_what_there_is(rule):
    check_expression(rule["expr"])


@pytest.mark.parametrize("panel", [panel for panel in panels() if "targets" in panel], ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_there_is_and_says_what_it_shows(panel):
    for target in panel["targets"]:
        expression = re.sub(r"\$__(rate_interval|range)", "5m", target["expr"])
        check_expression(expression)
        known = {label for name, _ in selectors(expression) for label in labels_of()[name]} | OF_THE_SCRAPE
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known
        assert target["legendFormat"]
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert():
    asked = {name for rule in rules() for name, _ in selectors(rule["expr"])}
    asked |= {name for query in dashboard_queries() for name, _ in selectors(query)}
    used = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked}
    # Told to those who look for one thing: misses are attaches less hits.
    spare = {"cached_misses_total", "cached_adopted_bytes_total", "cached_transfer_seconds_total", "cached_models",
             "cached_model_bytes", "cached_telemetry_spans_total",
             "cached_config_last_reload_success_timestamp_seconds"}  # fmt: skip
    assert {info.name for info in METRICS} - used == spare


def test_panels_have_places_of_their_own():
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels()], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_the_dashboard_is_what_its_script_writes():
    script = ROOT / "deploy/grafana/generate.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_variables_are_those_that_its_queries_have():
    names = {item["name"] for item in dashboard()["templating"]["list"]}
    text = json.dumps(panels())
    asked = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range"}
    assert asked == names


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert):
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    document, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    assert anchor in anchors(text_of(document))
    told = section(text_of(document), alert["alert"])
    assert re.search(r"^\*\*Look\*\*: .*`.+`", told, re.MULTILINE), "which commands show more"
    assert re.search(r"^\*\*Do\*\*: ", told, re.MULTILINE)
    assert f"*{alert['labels']['severity']}*" in told


def test_the_runbook_has_no_alert_that_there_is_not():
    told = re.findall(r"^### (Cached\w+)$", text_of("docs/observability.md"), re.MULTILINE)
    assert told == [alert["alert"] for alert in alerts()]


def test_every_alert_is_tested():
    tested = "".join(path.read_text() for path in RULE_TESTS)
    assert [alert["alert"] for alert in alerts() if f'alertname="{alert["alert"]}"' not in tested] == []


def test_outcomes_that_are_shown_from_the_start_are_ones():
    assert set(PULL_OUTCOMES) - {"ok"} <= all_errors().keys()
    told = {word for alert in alerts() for word in re.findall(r"\b[A-Z]+_[A-Z_]+\b", alert["expr"])}
    assert told - {"ORIGIN_"} <= all_errors().keys()


def promtool(*words: str) -> None:
    program = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=RULES.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules():
    promtool("check", "rules", RULES.name)


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.name)
def test_alerts_fire_when_they_should_and_only_then(path):
    promtool("test", "rules", path.name)
