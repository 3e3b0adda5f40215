"""The directory view: what its links lead to while segments get other names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cached.cache.links import DirectoryView
from cached.errors import LevelError


@pytest.fixture
def view(tmp_path: Path) -> DirectoryView:
    view = DirectoryView(tmp_path / "models")
    view.clear()
    return view


def links(view: DirectoryView, name: str, revision: str) -> dict[str, str]:
    folder = Path(view.path(name, revision))
    return {str(path.relative_to(folder)): os.readlink(path) for path in folder.rglob("*") if path.is_symlink()}


def test_every_view_of_a_segment_follows_it_to_its_new_name(view: DirectoryView) -> None:
    view.show("one", "r1", {"a": "/ingest.1", "deep/b": "/ingest.1", "c": "/blob.3"}, current=True, arriving=True)
    view.show("two", "r2", {"a": "/ingest.1", "b": "/ingest.2"}, current=False, arriving=True)
    view.moved("/ingest.1", "/blob.1")
    assert links(view, "one", "r1") == {"a": "/blob.1", "deep/b": "/blob.1", "c": "/blob.3"}
    assert links(view, "two", "r2") == {"a": "/blob.1", "b": "/ingest.2"}
    view.moved("/ingest.2", "/blob.2")
    assert links(view, "two", "r2") == {"a": "/blob.1", "b": "/blob.2"}


def test_what_is_settled_or_hidden_follows_nothing(view: DirectoryView) -> None:
    view.show("one", "r1", {"a": "/ingest.1"}, current=True, arriving=True)
    view.show("one", "r1", {"a": "/blob.1"}, current=True)
    view.show("two", "r2", {"a": "/ingest.1"}, current=True, arriving=True)
    view.hide("two", "r2")
    view.moved("/ingest.1", "/elsewhere")
    assert links(view, "one", "r1") == {"a": "/blob.1"}
    assert view.path("two", "r2") == ""


def test_a_view_that_cannot_be_taken_away_is_told(view: DirectoryView, tmp_path: Path) -> None:
    """It would go on to show what was evicted, or is damaged."""
    view.show("one", "r1", {"a": "/blob.1"}, current=True)
    folder = Path(view.path("one", "r1"))
    shown = tmp_path / "models" / ".views" / "one@r1"
    shown.rename(tmp_path / "aside")
    shown.symlink_to(tmp_path / "aside")
    with pytest.raises(LevelError):
        view.hide("one", "r1")
    shown.unlink()
    view.hide("one", "r1")
    assert not folder.exists()
