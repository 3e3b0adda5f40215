"""Where a model's files are seen as ordinary files: `Model.directory`, and the paths in `Model.files`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import cached_client
from cached_client.testing import FakeDaemon
from tests.unit.client_support import two_shards, without_rights

FIRST = "model-00001-of-00002.safetensors"
FILES = two_shards()[0]


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        running.add("m", FILES)
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


def test_the_directory_view(daemon, cache, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    (view / "config.json").write_bytes(FILES["config.json"])
    daemon.directory_view = view
    with cache.attach("m", wait=True) as model:
        assert model.directory == view
        assert model.files["config.json"].local_path == view / "config.json"
        assert model.files[FIRST].local_path is None
        assert len(model.files[FIRST].sha256) == 64
    daemon.directory_view = tmp_path / "in another mount namespace"
    with cache.attach("m", wait=True) as model:
        assert model.directory is None
        daemon.stop()
        assert dict(model.files).keys() == FILES.keys()


def test_files_that_may_not_be_looked_at_have_no_local_path(daemon, cache) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are private
        private, view = Path(name, "private"), Path(name, "view")
        private.mkdir()
        (private / "segment").touch()
        private.chmod(0)
        view.mkdir()
        (view / "config.json").symlink_to(private / "segment")
        for folder in (Path(name), view):
            folder.chmod(0o755)
        daemon.directory_view = view
        with cache.attach("m", wait=True) as model, without_rights():
            assert model.directory == view
            assert model.files["config.json"].local_path is None
        private.chmod(0o700)


def test_the_directory_view_stays_that_of_this_revision(daemon, cache, tmp_path: Path) -> None:
    mine, later = tmp_path / "m@1", tmp_path / "m@2"
    mine.mkdir()
    later.mkdir()
    link = tmp_path / "m"
    link.symlink_to(mine)
    daemon.directory_view = link
    with cache.attach("m", wait=True) as model:
        directory = model.directory
        link.unlink()
        link.symlink_to(later)
        assert directory == mine
