"""Labels of a node: names that Kubernetes takes, for the models that matter most."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from cached.fleet.labels import MAX_MODELS, Ready, changes, label_name, labels_of, ours

LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
REVISION = "0123456789abcdef"


@pytest.mark.parametrize("name", ["llama-13b", "a", "Qwen2.5_7B", "x" * 63])
def test_a_name_that_may_be_a_labels_stays(name: str) -> None:
    assert label_name(name) == name


@pytest.mark.parametrize("name", ["x" * 64, "llama-", "a.", "m" * 128, "ends_", "9" + "-" * 60 + "."])
def test_every_other_name_becomes_one_that_tells_it_apart(name: str) -> None:
    made = label_name(name)
    assert LABEL.fullmatch(made), made
    assert made != label_name(name + "x" if len(name) > 64 else name + "y_")


def test_a_model_in_memory_has_two_labels_and_one_on_disk_has_one() -> None:
    found = labels_of("m.example", [Ready("hot", REVISION, in_l1=True), Ready("cool", REVISION, in_l1=False)])
    assert found == {
        "m.example/hot": "0123456789ab", "l1.m.example/hot": "0123456789ab", "m.example/cool": "0123456789ab"
    }  # fmt: skip


def test_of_too_many_those_in_memory_and_of_high_priority_are_labelled() -> None:
    many = [Ready(f"m{number}", REVISION, in_l1=False) for number in range(3 * MAX_MODELS)]
    first = [Ready("zz-memory", REVISION, in_l1=True), Ready("zz-dear", REVISION, in_l1=False, priority=9)]
    found = labels_of("p", [*many, *first])
    assert len(found) == MAX_MODELS + 1
    assert {"p/zz-memory", "l1.p/zz-memory", "p/zz-dear"} <= found.keys()


def test_only_our_own_labels_are_looked_at_and_changed() -> None:
    have = ours("p.x", {"p.x/a": "1", "l1.p.x/a": "1", "q.p.x/a": "1", "p.x2/a": "1", "role": "gpu"})
    assert have == {"p.x/a": "1", "l1.p.x/a": "1"}
    assert changes(have, {"p.x/a": "2", "p.x/b": "1"}) == {"l1.p.x/a": None, "p.x/a": "2", "p.x/b": "1"}
    assert changes(have, have) == {}


def test_a_daemon_that_needs_no_kubernetes_does_not_load_its_library() -> None:
    code = "import sys, cached.daemon; print('kubernetes' in sys.modules, 'cached.fleet.kube' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "True"]
