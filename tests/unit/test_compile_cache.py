"""A compile cache around a worker's start: what does not work keeps it from nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cached_client
from cached_client import artifacts
from cached_client.artifacts import Missed, Restored, session
from cached_client.errors import ArtifactError, InvalidRequestError


@pytest.fixture
def cache(tmp_path: Path):
    """Of a daemon that is not there."""
    with cached_client.connect(str(tmp_path / "nobody.sock")) as connected:
        yield connected


def begun(cache: cached_client.Cache, directory: Path, *, strict: bool = False) -> artifacts.CompileCache:
    return artifacts.compile_cache(
        cache, model="m", engine="e", directory=directory, device="cpu", set_environment=True, strict=strict
    )


@pytest.fixture(params=["a file", "below a file"])
def impossible(request, tmp_path: Path) -> Path:
    """A directory that not even root can make."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" if request.param == "a file" else tmp_path / "file" / "folder"


def test_a_directory_that_cannot_be_made_keeps_no_worker_from_starting(cache, impossible, monkeypatch, caplog):
    monkeypatch.setattr(session, "restore", lambda *_, **__: Missed("artifact", "there is none"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/as/before")
    with begun(cache, impossible) as entered:
        assert isinstance(entered.error, ArtifactError)
        assert os.environ["TRITON_CACHE_DIR"] == "/as/before"
        assert entered.save() is None
    assert os.environ["TRITON_CACHE_DIR"] == "/as/before"
    assert entered.saved is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"the directory {impossible} cannot be made" in caplog.text
    with pytest.raises(ArtifactError, match="cannot be made") as raised, begun(cache, impossible, strict=True):
        pass
    assert isinstance(raised.value.__cause__, OSError)


def test_neither_does_it_without_a_daemon(cache, impossible):
    with begun(cache, impossible) as entered:
        assert entered.restored is None
    assert isinstance(entered.error, ArtifactError)


def test_a_directory_that_cannot_be_read_after_the_restore_is_told(cache, tmp_path, monkeypatch):
    def unreadable(*_):
        raise ArtifactError("the directory cannot be read")

    restored = Restored("artifact", "ab" * 32, 1, added_files=1, kept_files=0, seconds=0.0, from_level="l1")
    monkeypatch.setattr(session, "restore", lambda *_, **__: restored)
    monkeypatch.setattr(session, "scan", unreadable)
    with begun(cache, tmp_path / "d") as entered:
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "d" / "triton")
    assert isinstance(entered.error, ArtifactError)


@pytest.mark.parametrize("wrong", [{"tp": 2}, {"tp": None}, {"tp": b"2"}, {"tp": "\ud800"}, {2: "tp"}])
def test_a_key_that_is_no_dictionary_of_texts_is_refused_by_its_field(cache, tmp_path, caplog, wrong):
    key = {"model": "m", "engine": "e", **wrong}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "kernel.so").write_bytes(b"1")
    for refused in (artifacts.restore, artifacts.save):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(wrong))!r} of the key .* is no text"):
            refused(cache, tmp_path / "d", key)
    with artifacts.compile_cache(cache, model="m", engine="e", directory=tmp_path / "d", key=key) as entered:
        assert isinstance(entered.error, InvalidRequestError)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
