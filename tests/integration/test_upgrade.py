"""State that another version wrote: an earlier one's is gone on with, a newer one's is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cached_client
from cached import __version__
from cached.index.store import FORMAT as INDEX_FORMAT
from cached.layout import LAYOUT
from cached.levels.disk import FORMAT as DISK_FORMAT
from cached.levels.journal import FORMAT as JOURNAL_FORMAT
from cached.units import CHUNK_BYTES
from tests.integration.harness import DaemonProcess
from tests.integration.make_state import NAME, archive_of, expected_files
from tests.integration.support import ROOT, SERVE, Site
from tests.integration.test_restart import HELD, WEIGHTS, finish, interrupted, range_of

BEFORE_TAGS = "664a29c489644ee2b3072611d72c071cd5aa4bc2"
"""What stands for the last release until there is a tag: the last version that gave its layout no number."""

EARLIER = "0.0.1"
"""What it calls itself where its version is still ours, so that the two can be told apart."""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the last release, from this repository's history."""
    described = git("describe", "--tags", "--abbrev=0", "HEAD^")
    commit = described.stdout.strip() if described.returncode == 0 else BEFORE_TAGS
    folder = tmp_path_factory.mktemp("earlier")
    archive = folder / "code.tar"
    done = git("archive", "--format=tar", f"--output={archive}", commit, "cached", "client")
    if done.returncode:
        pytest.skip(f"this checkout has no history that reaches {commit}: no state of an earlier version was tried")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    package = folder / "cached" / "__init__.py"
    package.write_text(package.read_text().replace(f'"{__version__}"', f'"{EARLIER}"'))
    return folder


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def run_as(site: Site, checkout: Path) -> None:
    """The next start is that of this version, on the same state."""
    site.daemon.environment["PYTHONPATH"] = f"{checkout}:{checkout}/client:{ROOT}"


def test_an_upgrade_and_back_fetches_nothing_again(site: Site, earlier: Path) -> None:
    """Killed within a pull: the index, a journal, an ingest at each level, and segments are all the other version's."""
    site.started_by(sys.executable, "-P", *SERVE[1:])  # -P: not the code of the working folder
    run_as(site, earlier)
    interrupted(site, signal.SIGKILL, on_disk=True)
    (started,) = site.daemon.log_events("daemon.starting")
    assert started["version"] != __version__
    run_as(site, ROOT)
    finish(site)
    assert site.ranges(WEIGHTS) == [range_of(HELD)], "the rest was there"
    assert site.proxy.get_bytes() == CHUNK_BYTES
    site.check_served("m")
    assert (site.daemon.state_dir / "LAYOUT").read_text() == f"{LAYOUT}\ncached {__version__}\n"

    site.proxy.clear()
    assert site.daemon.terminate() == 0
    run_as(site, earlier)
    site.start()
    site.check_served("m")
    assert not site.proxy.gets(WEIGHTS)
    assert not site.daemon.log_events("recovery.set_aside", all_starts=True)
    assert not site.daemon.log_events("index.set_aside", all_starts=True)


@pytest.mark.parametrize("layout", range(1, LAYOUT + 1))
def test_every_layout_that_ever_was_is_read(tmp_path: Path, layout: int) -> None:
    daemon = DaemonProcess(tmp_path / "d")
    with tarfile.open(archive_of(layout)) as archive:
        archive.extractall(daemon.folder, filter="data")
    with daemon, cached_client.connect(str(daemon.socket)) as cache:
        (summary,) = cache.list()
        assert (summary.name, summary.state, summary.pinned) == (NAME, "ready", True)
        with cache.attach(NAME, timeout_s=60) as model:
            model.wait(60)
            for path, data in expected_files().items():
                assert model.view(path) == data, path
        assert daemon.log_events("index.set_aside") == daemon.log_events("recovery.set_aside") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{LAYOUT + 1}\ncached 9.8.7\n", f"has layout {LAYOUT + 1}, of cached 9.8.7; this is cached {__version__}"),
        ("first\n", "has no layout that can be read: 'first'"),
        ("", "has no layout that can be read: ''"),
    ],
)
def test_a_layout_that_is_not_known_is_left_alone(tmp_path: Path, text: str, says: str) -> None:
    daemon = DaemonProcess(tmp_path / "d")
    daemon.state_dir.mkdir()
    (daemon.state_dir / "LAYOUT").write_text(text)
    (daemon.state_dir / "index").mkdir()
    (daemon.state_dir / "index" / "cache.db").write_bytes(b"of a later time")
    try:
        daemon.start(wait=False)
        assert daemon.wait() == 1
        assert says in daemon.log()
        assert f"mv {daemon.state_dir} {daemon.state_dir}.aside" in daemon.log()
        assert (daemon.state_dir / "LAYOUT").read_text() == text
        assert (daemon.state_dir / "index" / "cache.db").read_bytes() == b"of a later time"
        assert not daemon.l2_dir.exists()
    finally:
        daemon.close()


def test_the_number_covers_the_formats_of_all_parts() -> None:
    """Whoever changes one of them: a new number, with an archive of its own, and the formats that it stands for."""
    formats = {1: (1, "1", 1)}
    assert formats[LAYOUT] == (INDEX_FORMAT, DISK_FORMAT, JOURNAL_FORMAT)
    assert archive_of(LAYOUT).is_file()
