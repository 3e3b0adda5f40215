"""Every kind of failure has all that it must have; what is missing is named with what to add, and where."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
import yaml

import cached
from cached.errors import CachedError, all_errors
from cached.failures import KINDS, PARTS, FailureKind
from cached.metrics import METRICS, Metrics
from cached.rpc.errors import STATUS
from cached_client import errors as client_errors
from tests.docs.documents import ROOT, anchors, section, text_of
from tests.docs.test_reference import emitted_kinds

OPERATIONS = text_of("docs/operations.md")
OBSERVABILITY = text_of("docs/observability.md")
_NOT_IMPORTED = ("cached.cli.doctor.worker", "cached.cli.bench.workers")
"""Programs of their own: to import them is to run them."""


def alerts() -> set[str]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def subclasses(kind: type[CachedError]) -> Iterator[type[CachedError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def missing(kind: FailureKind) -> Iterator[str]:
    """What this kind has not, as what to add and where."""
    reason, kinds = kind.reason, all_errors()
    if kinds[reason] not in STATUS:
        yield f"its gRPC status: cached/rpc/errors.py, STATUS[errors.{kinds[reason].__name__}]"
    if reason not in client_errors._KINDS:
        yield f"the client's exception: client/cached_client/errors.py, _KINDS[{reason!r}]"
    for event in kind.events:
        if event not in emitted_kinds():
            yield f"somebody who tells of the event {event}"
        if f"`{event}`" not in section(text_of("docs/reference.md"), "Events"):
            yield f"the event {event} in docs/reference.md, Events"
    if f"\n### {reason}\n" not in OPERATIONS:
        yield f"a paragraph: docs/operations.md, Failures, '### {reason}'"
        return
    told = section(OPERATIONS, reason)
    if not re.search(r"^\*\*Do\*\*: (.*\n)*?.*`[^`]+`", told, re.MULTILINE):
        yield f"what to do, with the command: docs/operations.md, {reason}, '**Do**: … `cached …`'"
    if len(told.partition("**Do**")[0].strip()) < 40:
        yield f"what it means: docs/operations.md, {reason}"
    for alert in kind.alerts:
        if alert not in alerts():
            yield f"the alert {alert}: deploy/prometheus/alerts.yaml"
        elif f"](operations.md#{reason.lower()})" not in section(OBSERVABILITY, alert):
            yield f"a link to [{reason}](operations.md#{reason.lower()}): docs/observability.md, {alert}"
        if f"](observability.md#{alert.lower()})" not in told:
            yield f"a link to [{alert}](observability.md#{alert.lower()}): docs/operations.md, {reason}"


def test_every_reason_is_one_kind():
    known = [kind.reason for kind in KINDS]
    assert len(known) == len(set(known))
    lines = [f'FailureKind("{reason}", Whose.…)' for reason in all_errors() if reason not in known]
    assert not lines, f"add to KINDS in cached/failures.py: {', '.join(lines)}"
    assert set(known) == set(all_errors()), "a kind without an error"


def test_every_error_of_the_daemon_has_a_reason_that_is_a_kind():
    for module in pkgutil.walk_packages(cached.__path__, "cached."):
        if not module.name.startswith(_NOT_IMPORTED) and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                pytest.fail(f"{module.name}: {error}")
    unknown = {kind.__name__: kind.reason for kind in subclasses(CachedError) if kind.reason not in all_errors()}
    assert not unknown, f"reasons that no error of cached/errors.py has: {unknown}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.reason)
def test_a_kind_has_all_that_it_must_have(kind: FailureKind):
    found = list(missing(kind))
    assert not found, f"{kind.reason} has not: " + "; ".join(found)


def test_every_kind_is_counted_from_the_start():
    assert "cached_failures_total" in {info.name for info in METRICS}
    counted = Metrics().counters()
    assert [kind.reason for kind in KINDS if f'cached_failures_total{{reason="{kind.reason}"}}' not in counted] == []


@pytest.mark.parametrize("part", PARTS)
def test_what_can_be_degraded_is_a_kind_and_has_its_paragraph(part: str):
    item = PARTS[part]
    assert item.reason in all_errors()
    assert section(OPERATIONS, item.runbook)
    assert item.advice.endswith(".")


def test_every_reason_of_the_client_is_told_of():
    reasons = {kind.kind_reason for kind in vars(client_errors).values() if isinstance(kind, type) and
               issubclass(kind, client_errors.CacheError)}  # fmt: skip
    own = {reason for reason in reasons if reason not in all_errors()}
    told = section(OPERATIONS, "Only in a client")
    assert [reason for reason in sorted(own) if f"| `{reason}` |" not in told] == []


def test_links_to_failures_lead_to_one():
    told = set(re.findall(r"\(operations\.md#([a-z_]+)\)", OBSERVABILITY))
    assert told <= anchors(OPERATIONS)
