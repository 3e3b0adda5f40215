"""docs/reference.md names everything that has a name, and the generated parts are what the code says now."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from itertools import chain

import pytest

from cached import errors, metrics, settings
from cached.catalog_file import FORMATS, ORIGIN_KEYS, SCHEMES, CatalogModel, parse_catalog
from cached.cli.failures import EXIT_CODES
from cached.policy.plan import REASONS
from cached.types import CheckedBy, RevisionState, Tier
from cached_client import errors as client_errors
from docs import generate
from tests.docs.documents import DOCUMENTS, ROOT, blocks, section, text_of

REFERENCE = text_of("docs/reference.md")


@pytest.mark.parametrize("document", sorted({part.document for part in generate.PARTS}))
def test_generated_parts_are_fresh(document):
    text = text_of(f"docs/{document}")
    assert generate.generated(document, text) == text, "run: make docs"


@pytest.mark.parametrize("setting", [item.key for item in settings.describe_settings()])
def test_every_setting_is_there(setting):
    assert f"| `{setting}` |" in section(REFERENCE, "Settings")


@pytest.mark.parametrize("metric", [item.name for item in metrics.METRICS])
def test_every_metric_is_there(metric):
    assert f"| `{metric}` |" in section(REFERENCE, "Metrics")


def test_every_label_value_that_is_told_is_one():
    told = section(REFERENCE, "Metrics").split("|", 1)[0]
    reasons = {*REASONS, "operator", "artifact"}
    assert {value for value in (*metrics.HOPS, *metrics.LEVELS, *reasons) if f"`{value}`" not in told} == set()


def test_every_reason_of_a_degraded_daemon_says_what_to_do():
    told = section(text_of("docs/observability.md"), "CachedDegraded")
    assert [reason for reason in metrics.DEGRADED_REASONS if f"`{reason}`" not in told] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metric_that_is_told_of_exists(path):
    names = {item.name for item in metrics.METRICS}
    families = tuple({f"cached_{name.split('_')[1]}_" for name in names if name.count("_") > 1})
    told = set(re.findall(r"`(cached_[a-z0-9_]+)`", path.read_text())) - {"cached_client"}
    assert {name for name in told if name.startswith(families)} <= names
    if path.name == "observability.md":
        assert told <= names


def test_every_rpc_is_there():
    service = (ROOT / "proto/cached/v1/cached.proto").read_text().split("service CacheService {")[1].split("\n}")[0]
    names = re.findall(r"rpc (\w+)\(", service)
    assert names == [name for name, _, _ in generate.rpcs()]
    assert [name for name in names if f"| `{name}` |" not in section(REFERENCE, "RPC")] == []


@pytest.mark.parametrize("reason", errors.all_errors())
def test_every_reason_is_there_and_operations_say_what_to_do(reason):
    assert f"| `{reason}` |" in section(REFERENCE, "Errors")
    assert section(text_of("docs/operations.md"), reason)


def test_every_error_of_the_client_is_there():
    kinds = [kind for kind in vars(client_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    text = section(REFERENCE, "Python client")
    assert [kind.__name__ for kind in kinds if f"| `{kind.__name__}` |" not in text] == []


def test_every_verb_and_option_is_there():
    text = section(REFERENCE, "Command line")
    for name, command in generate.verbs():
        part = section(text, f"`cached {name}`")
        for option in command.params:
            for word in option.opts if option.opts[0].startswith("-") else ():
                assert word in part, f"cached {name}: {word}"


def test_every_exit_code_is_there():
    text = section(REFERENCE, "Exit codes")
    for reason, code in EXIT_CODES.items():
        assert any(line.startswith(f"| {code} |") and f"`{reason}`" in line for line in text.splitlines()), reason


def test_every_endpoint_is_there():
    served = re.findall(r'web\.get\("([^"]+)"', (ROOT / "cached/web/http.py").read_text())
    assert served
    assert [path for path in served if f"| `{path}` |" not in section(REFERENCE, "HTTP")] == []


def test_every_kind_of_event_is_there_and_no_other():
    first_cells = re.findall(r"^\| (`.*?) \|", section(REFERENCE, "Events"), re.MULTILINE)
    told = set(re.findall(r"`([a-z0-9_.]+)`", " ".join(first_cells)))
    assert told == emitted_kinds() | {"events.dropped"}


@cache
def emitted_kinds() -> frozenset[str]:
    kinds: set[str] = set()
    for path in (ROOT / "cached").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"emit", "tell", "report", "refused", "_report"}
                and node.args
            ):
                kinds |= {str(item.value) for item in ast.walk(node.args[0]) if isinstance(item, ast.Constant)}
    return frozenset(kinds)


def test_every_key_of_the_catalog_is_there():
    names = {item.name for item in dataclasses.fields(CatalogModel)} - {"name"}
    text = section(REFERENCE, "Catalog")
    for name in names - {"size_bytes", "front"} | {"size", "origins"}:
        assert re.search(rf"^\| [^|]*`{name}`", text, re.MULTILINE), name
    assert [
        word
        for word in (*FORMATS, *chain(*ORIGIN_KEYS.values()), *Tier, *(f"{scheme}://" for scheme in SCHEMES))
        if word not in text
    ] == []


@pytest.mark.parametrize("document", ["README.md", "docs/reference.md"])
def test_the_catalogs_that_are_shown_are_valid(document):
    shown = [text for text in blocks(text_of(document), "json") if '"models"' in text]
    assert shown
    for text in shown:
        assert parse_catalog(text, "json", document).models


def test_words_of_states_and_checks_are_explained():
    text = text_of("docs/semantics.md")
    words = [*RevisionState, *CheckedBy, *Tier]
    assert [
        word for word in words if f"`{word}`" not in text and f"| {word} |" not in text and f"**{word}**" not in text
    ] == []
