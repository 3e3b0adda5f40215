"""Every warning and error that the log may hold is explained where an operator looks for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.docs.documents import ROOT, section, text_of
from tests.docs.test_reference import emitted_kinds

_SEVERE = {"warning", "error", "exception", "critical"}
_TOLD_ELSEWHERE = {"failed_event", "kind"}
"""Variables that stand for a name: one is an argument of this name, found there; the other is a kind of event."""


@cache
def _calls() -> tuple[ast.Call, ...]:
    files = sorted((ROOT / "cached").rglob("*.py"))
    return tuple(node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def _first_arguments() -> Iterator[ast.expr]:
    """Of each call that logs a warning or worse."""
    for call in _calls():
        logs = isinstance(call.func, ast.Attribute) and call.func.attr in _SEVERE
        if logs and call.args and re.fullmatch(r"_?log(ger)?", ast.unparse(call.func.value)):  # type: ignore[attr-defined]
            yield call.args[0]
        yield from (word.value for word in call.keywords if word.arg in _TOLD_ELSEWHERE - {"kind"})


def _logged() -> set[str]:
    found = {node.value for node in _first_arguments() if isinstance(node, ast.Constant)}
    return {str(name) for name in found}


def _explained() -> set[str]:
    table = section(text_of("docs/operations.md"), "The log")
    return {
        name for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }


def test_every_warning_and_error_of_the_log_is_explained():
    assert len(_logged()) > 30, "the search finds nothing any more"
    missing = sorted(_logged() - _explained() - {"event"})
    assert not missing, f"add a row, what it means and what to do, to docs/operations.md, The log: {missing}"


def test_no_name_of_an_event_is_made_where_the_search_does_not_see_it():
    names = {ast.unparse(node) for node in _first_arguments() if not isinstance(node, ast.Constant)}
    assert names <= _TOLD_ELSEWHERE, f"say these as they are: {sorted(names - _TOLD_ELSEWHERE)}"


def test_what_is_explained_is_logged():
    words = {
        node.value
        for path in (ROOT / "cached").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    gone = _explained() - {"event"} - words - emitted_kinds()
    assert not gone, f"nobody logs these any more: {sorted(gone)}"
