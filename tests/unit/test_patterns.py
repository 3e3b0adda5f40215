"""Patterns of tensor names: what they match, what is told of those that match nothing, and which files are weights."""

from __future__ import annotations

import pytest

from cached_client.patterns import is_wild, matched, nearest, weight_files

NAMES = ["model.embed.weight", "model.layers.0.q.weight", "model.layers.1.q.weight", "model.layers.10.q.weight", "x[0]"]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["*"], NAMES),
        (["model.layers.1.*"], [NAMES[2]]),
        (["model.layers.[01].*"], NAMES[1:3]),
        (["model.layers.?.q.weight", "model.embed.weight"], NAMES[:3]),
        (["model.layers.[!1].*"], [NAMES[1]]),
        (["x[[]0]"], ["x[0]"]),
    ],
)
def test_names_are_matched_as_a_shell_does_it_and_keep_their_order(patterns: list[str], found: list[str]) -> None:
    assert matched(patterns, NAMES) == (found, [])
    assert matched(patterns, dict.fromkeys(NAMES, 0)) == (found, [])


def test_patterns_that_match_nothing_are_told_by_number() -> None:
    assert matched(["model.embed.weight", "Model.*", "lm_head.weight", "*"], NAMES[:2]) == (NAMES[:2], [1, 2])


def test_the_nearest_names_begin_alike() -> None:
    assert nearest("model.layers.1.k.*", NAMES) == [NAMES[2], NAMES[3], NAMES[1]]
    assert nearest("transformer.h.0", NAMES) == []
    assert nearest("*.nothing", NAMES) == []


def test_wildcards_are_known() -> None:
    assert [is_wild(pattern) for pattern in ("a.b", "a.*", "a.?", "a[0]")] == [False, True, True, True]


@pytest.mark.parametrize(
    ("paths", "named", "chosen"),
    [
        (["b.safetensors", "a.safetensors", "config.json"], [], ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "original/a.safetensors"], [], ["a.safetensors"]),
        (["one/a.safetensors", "two/a.safetensors"], [], ["one/a.safetensors", "two/a.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["b.safetensors", "gone.safetensors"], ["b.safetensors"]),
        (["a.safetensors"], ["gone.safetensors"], ["a.safetensors"]),
        (["config.json"], [], []),
    ],
)
def test_weight_files_are_those_of_the_index_else_those_at_the_top(
    paths: list[str], named: list[str], chosen: list[str]
) -> None:
    assert weight_files(paths, named) == chosen
