"""The archive of a compile cache: the same bytes for the same files, and nothing hostile comes out of one."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cached_client.artifacts import Archive, scan, unpack
from cached_client.artifacts.archive import PIECE_BYTES
from cached_client.errors import ArtifactError, IntegrityError

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = "a/" + "b" * 120 + "/" + "ü" * 80 + ".so"


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def packed(folder: Path) -> bytes:
    archive = Archive(folder)
    data = b"".join(archive.pieces())
    assert len(data) == archive.size_bytes
    assert hashlib.sha256(data).hexdigest() == archive.sha256()
    return data


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restored(data: bytes, folder: Path) -> tuple[int, int]:
    return unpack(memoryview(data), folder, max_bytes=len(data))


FILES = {
    "aa/kernel.so": os.urandom(3000),
    "aa/kernel.py": b"print(1)\n" * 100,
    "empty": b"",
    LONG: b"long",
    "big.bin": os.urandom(2 * PIECE_BYTES + 17),
}


def test_an_archive_is_the_same_wherever_and_whenever_it_is_made(tmp_path):
    one = fill(tmp_path / "one", FILES)
    other = fill(tmp_path / "elsewhere" / "other", dict(reversed(FILES.items())))
    (one / "aa/kernel.so").chmod(0o700)
    (other / "aa/kernel.so").chmod(0o755)
    (other / "aa/kernel.py").chmod(0o600)
    os.utime(other / "big.bin", (1, 1))
    (other / "nothing" / "in" / "here").mkdir(parents=True)
    assert packed(one) == packed(other)
    (other / "aa/kernel.so").chmod(0o644)
    assert packed(one) != packed(other), "whether a file can be executed is content"


def test_it_comes_back_as_it_was(tmp_path):
    folder = fill(tmp_path / "in", FILES)
    (folder / "aa/kernel.so").chmod(0o755)
    assert restored(packed(folder), tmp_path / "deep" / "out") == (len(FILES), 0)
    assert contents(tmp_path / "deep" / "out") == FILES
    assert os.access(tmp_path / "deep/out/aa/kernel.so", os.X_OK)
    assert not os.access(tmp_path / "deep/out/aa/kernel.py", os.X_OK)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"], "nothing else is left"


def test_any_tar_reads_it(tmp_path):
    data = packed(fill(tmp_path / "in", FILES))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert set(tar.getnames()) == set(FILES)
        assert {(item.mtime, item.uid, item.gid, item.uname) for item in tar} == {(0, 0, 0, "")}


def test_locks_unfinished_files_and_links_stay_out(tmp_path):
    folder = fill(
        tmp_path / "in",
        {"k.so": b"1", "locks/k.lock": b"", "tmp.pid_1_2/k.so": b"", "__pycache__/k.pyc": b"", "x.tmp": b""},
    )
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "folder-link").symlink_to("/etc")
    os.mkfifo(folder / "fifo")
    members, left_out = scan(folder)
    assert [member.path for member in members] == ["k.so"]
    assert left_out == ("fifo", "folder-link", "link")


def test_a_path_that_no_restore_takes_stays_out_and_the_longest_that_it_takes_comes_back(tmp_path):
    deep, long = "a/" * 31, ("b" * 204 + "/") * 4 + "c" * 203
    assert (len(deep.split("/")), len(long)) == (32, 1023)
    kept = {f"{deep}f": b"1", f"{long}c": b"2"}
    folder = fill(tmp_path / "in", kept | {f"{deep}a/f": b"3", f"{long}cc": b"4", f"{long[:-1]}üü": b"5"})
    _, left_out = scan(folder)
    assert set(left_out) == {f"{deep}a/f", f"{long}cc", f"{long[:-1]}üü"}
    assert restored(packed(folder), tmp_path / "out") == (2, 0)
    assert contents(tmp_path / "out") == kept


def test_an_empty_or_missing_directory_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ArtifactError, match="nothing to save"):
        Archive(tmp_path / "in")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Archive(tmp_path / "no")


@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "a link"])
def test_a_file_that_changes_under_the_archive_is_an_error(tmp_path, change):
    folder = fill(tmp_path / "in", {"a": b"12345", "b": b"67890"})
    archive = Archive(folder)
    if change in {"gone", "a link"}:
        (folder / "b").unlink()
    if change == "a link":
        (folder / "b").symlink_to(folder / "a")
    if change in {"longer", "shorter"}:
        (folder / "b").write_bytes(b"6" * (6 if change == "longer" else 4))
    with pytest.raises(ArtifactError, match="b was changed"):
        list(archive.pieces())


# What is restored where there are files already.


def test_files_that_are_there_stay_and_missing_ones_are_added(tmp_path):
    data = packed(fill(tmp_path / "in", FILES))
    out = fill(tmp_path / "out", {"aa/kernel.py": b"mine", "other": b"too"})
    assert restored(data, out) == (len(FILES) - 1, 1)
    assert contents(out) == FILES | {"aa/kernel.py": b"mine", "other": b"too"}
    assert restored(data, out) == (0, len(FILES))


def test_what_is_made_ready_for_a_filled_directory_is_in_it_and_goes(tmp_path, monkeypatch):
    """A cache folder is often a mount of its own: nothing can be renamed or linked into it from beside it."""
    data = packed(fill(tmp_path / "in", FILES))
    out = fill(tmp_path / "out", {"mine": b""})
    linked: list[Path] = []
    link = os.link

    def noted(source: Path, target: Path, **options: bool) -> None:
        linked.append(Path(source))
        link(source, target, **options)

    monkeypatch.setattr(os, "link", noted)
    restored(data, out)
    assert len(linked) == len(FILES)
    assert all(path.is_relative_to(out) for path in linked)
    assert contents(out) == FILES | {"mine": b""}
    assert {member.path for member in scan(out)[0]} == {*FILES, "mine"}


def test_an_empty_directory_gets_all_of_it_in_one_step(tmp_path):
    data = packed(fill(tmp_path / "in", FILES))
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    assert restored(data, out) == (len(FILES), 0)
    assert out.stat().st_ino != before


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    data = packed(fill(tmp_path / "in", {"aa/k": b"1", "b": b"2"}))
    away = tmp_path / "away"
    away.mkdir()
    out = fill(tmp_path / "out", {"mine": b""})
    (out / "aa").symlink_to(away)
    with pytest.raises(ArtifactError, match="is no folder"):
        restored(data, out)
    assert not list(away.iterdir())


def test_what_a_killed_restore_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    data = packed(fill(tmp_path / "in", {"k": b"1"}))
    stale, used = tmp_path / ".cached-restore.dead", tmp_path / ".cached-restore.used"
    fill(stale, {"content/k": b"half"})
    fill(used, {"content/k": b"half"})
    fd = os.open(used, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        restored(data, tmp_path / "out")
        assert used.exists()
        assert not stale.exists()
    finally:
        os.close(fd)


def test_many_restores_at_once_agree(tmp_path):
    data = packed(fill(tmp_path / "in", FILES))
    (tmp_path / "archive").write_bytes(data)
    program = (
        "import sys; from pathlib import Path; from cached_client.artifacts import unpack; archive, out = sys.argv[1:];"
        "data = Path(archive).read_bytes(); print(*unpack(memoryview(data), Path(out), max_bytes=len(data)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "archive"), str(tmp_path / "out")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(int(added) for added, _ in answers) == len(FILES), "each file was added once"
    assert contents(tmp_path / "out") == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"in", "archive", "out"}


# Archives that nobody of ours made.


def made(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512) + bytes(1024)


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, mode
    for key, value in more.items():
        setattr(info, key, value)
    return info


HOSTILE = {
    "absolute": [(member("/etc/evil"), b"x")],
    "parent": [(member("../evil"), b"x")],
    "parent inside": [(member("a/../../evil"), b"x")],
    "dot": [(member("./evil"), b"x")],
    "empty part": [(member("a//evil"), b"x")],
    "symlink": [(member("evil", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")],
    "hard link": [(member("evil", tarfile.LNKTYPE, linkname="/etc/passwd"), b"")],
    "device": [(member("evil", tarfile.CHRTYPE, devmajor=1, devminor=5), b"")],
    "fifo": [(member("evil", tarfile.FIFOTYPE), b"")],
    "folder": [(member("evil", tarfile.DIRTYPE), b"")],
    "sparse": [(member("evil", tarfile.GNUTYPE_SPARSE), b"x")],
    "setuid": [(member("evil", mode=0o4755), b"x")],
    "group may write": [(member("evil", mode=0o664), b"x")],
    "twice": [(member("evil"), b"x"), (member("evil"), b"y")],
    "file as folder": [(member("evil"), b"x"), (member("evil/more"), b"y")],
    "control characters": [(member("evil\x1b[2J"), b"x")],
    "backslash": [(member("a\\evil"), b"x")],
    "too deep": [(member("/".join(["d"] * 40)), b"x")],
    "too long": [(member("d" * 300), b"x")],
    "other records": [(member("evil", pax_headers={"GNU.sparse.major": "1"}), b"x")],
    "another size": [(member("evil", pax_headers={"size": "1000000"}), b"x")],
    "nothing": [],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path, what):
    data = made((member("good"), b"good"), *HOSTILE[what]) if HOSTILE[what] else made()
    with pytest.raises(IntegrityError, match="nothing was restored"):
        restored(data, tmp_path / "in" / "out")
    assert [str(path) for path in tmp_path.rglob("*")] == [str(tmp_path / "in")]


@pytest.mark.parametrize("cut", [1, 511, 512, 1024, 1536, 5000])
def test_an_archive_that_is_cut_off_is_refused(tmp_path, cut):
    data = packed(fill(tmp_path / "in", {"a": os.urandom(4000), "b": os.urandom(100)}))
    with pytest.raises(IntegrityError):
        restored(data[:-cut], tmp_path / "out")
    with pytest.raises(IntegrityError):
        restored(data + bytes(512), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_allowed_is_refused(tmp_path):
    data = packed(fill(tmp_path / "in", {"a": bytes(1000), "b": bytes(1000)}))
    with pytest.raises(IntegrityError, match="more than"):
        unpack(memoryview(data), tmp_path / "out", max_bytes=1500)


@pytest.mark.parametrize("noise", range(40))
def test_noise_never_gets_out_of_the_directory(tmp_path, noise):
    import random

    rng = random.Random(noise)
    data = bytearray(packed(fill(tmp_path / "in", {"d": b"1" * 600, "b/c": b"2" * 600, LONG: b"3"})))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        restored(bytes(data), tmp_path / "x" / "out")
    except (IntegrityError, ArtifactError):
        assert not (tmp_path / "x" / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "x"}
    assert {path.name for path in (tmp_path / "x").iterdir()} <= {"out"}
