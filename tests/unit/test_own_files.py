"""What somebody planted in the place of a file of the daemon's own is neither waited for, followed nor changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cached.cache.trace import TraceFiles
from cached.errors import ConfigError
from cached.layout import FILE, LAYOUT, claim_layout
from cached.own_files import opener
from cached.rpc import sockets
from cached.signatures import CatalogGuard, Signed, generate_key
from cached.types import Attached

THEIRS = "theirs\n"
ROW = Attached(1.0, "a", 10, 1.0)
Plant = Callable[[Path], None]


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def second_name(path: Path) -> None:
    os.link(theirs(path), path)


def link(path: Path) -> None:
    path.symlink_to(theirs(path))


def of_another_user(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs to give a file to another user")
    path.write_text(THEIRS)
    path.chmod(0o666)
    os.chown(path, 65534, 65534)


def theirs(path: Path) -> Path:
    """A file of ours elsewhere that a planted name would have us change."""
    other = path.with_name("theirs")
    other.write_text(THEIRS)
    return other


def untouched(path: Path) -> None:
    kept = path.with_name("theirs") if path.with_name("theirs").exists() else path
    if stat.S_ISREG(kept.lstat().st_mode):
        assert kept.read_text() == THEIRS


planted = pytest.mark.parametrize("plant", [fifo, second_name, link, of_another_user])


@planted
@pytest.mark.parametrize("mode", ["rb", "wb", "a+b", "r+b"])
def test_only_a_regular_file_of_ours_with_one_name_is_opened(tmp_path: Path, plant: Plant, mode: str) -> None:
    path = tmp_path / "file"
    plant(path)
    with pytest.raises(OSError), open(path, mode, opener=opener):
        pass
    untouched(path)


def test_a_file_of_ours_is_opened_and_cut_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("longer", "short"):
        with open(path, "w", encoding="ascii", opener=opener) as file:
            file.write(text)
    with open(path, encoding="ascii", opener=opener) as file:
        assert file.read() == "short"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@planted
def test_a_lock_is_not_taken_on_what_was_planted(tmp_path: Path, plant: Plant) -> None:
    path = tmp_path / "lock"
    plant(path)
    with pytest.raises(ConfigError, match="cannot open the lock") as caught:
        sockets.FileLock(str(path), "the state folder")
    assert "is to go" in caught.value.hint
    untouched(path)


@planted
def test_a_layout_is_not_read_from_what_was_planted(tmp_path: Path, plant: Plant) -> None:
    plant(tmp_path / FILE)
    with pytest.raises(ConfigError, match=r"cannot read .*LAYOUT"):
        claim_layout(str(tmp_path), "1.2.3")
    untouched(tmp_path / FILE)


def test_a_new_layout_is_durable_with_its_name(tmp_path: Path, synced: list[str]) -> None:
    claim_layout(str(tmp_path), "1.2.3")
    assert (tmp_path / FILE).read_text() == f"{LAYOUT}\ncached 1.2.3\n"
    assert synced[-1] == str(tmp_path)


@planted
def test_a_trace_is_neither_read_from_nor_written_to_what_was_planted(tmp_path: Path, plant: Plant) -> None:
    files = TraceFiles(tmp_path)
    plant(files.path)
    assert files.read() == []
    with pytest.raises(OSError):
        files.append([ROW])
    untouched(files.path)


@planted
def test_when_a_catalog_was_signed_is_not_read_from_what_was_planted(
    tmp_path: Path, plant: Plant, public_key: str
) -> None:
    taken = tmp_path / "taken"
    plant(taken)
    with pytest.raises(ConfigError, match="cannot read when the last catalog was signed"):
        CatalogGuard([public_key], str(taken)).taken(Signed("a", 5))
    untouched(taken)


@planted
def test_nothing_planted_keeps_a_catalogs_time_from_being_remembered_durably(
    tmp_path: Path, plant: Plant, public_key: str, synced: list[str]
) -> None:
    taken = tmp_path / "taken"
    plant(tmp_path / "taken.new")
    CatalogGuard([public_key], str(taken)).taken(Signed("a", 5))
    assert taken.read_text() == "5\n"
    assert synced[-1] == str(tmp_path), "else a power cut brings an older catalog back"
    assert taken.lstat().st_nlink == 1


@pytest.fixture
def public_key(tmp_path: Path) -> str:
    path = tmp_path / "key.pub"
    path.write_bytes(generate_key()[1])
    return str(path)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were synced, in their order."""
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        real(fd)
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", fsync)
    return seen
