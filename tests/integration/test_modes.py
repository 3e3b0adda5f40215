"""What others may read of a daemon's files: nothing, whatever the umask that it was started with."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import cached_client
from tests.integration.harness import DaemonProcess
from tests.integration.support import MB, SERVE, model_files


def found(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Each file and folder with its kind and its mode; links have none."""
    for place, folders, names in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *names)):
            state = path.lstat()
            if not stat.S_ISLNK(state.st_mode):
                yield path, stat.S_IFMT(state.st_mode), stat.S_IMODE(state.st_mode)


def allowed(daemon: DaemonProcess, path: Path, kind: int) -> int:
    """The widest mode that it may have."""
    if kind == stat.S_IFSOCK:
        return 0o660 if path.parent == daemon.socket.parent else 0o777  # the inner one is in a closed folder
    if kind == stat.S_IFDIR:
        return 0o755 if daemon.models_dir in (path, *path.parents) else 0o700
    return 0o600


@pytest.mark.parametrize("umask", ["000", "077"])
def test_nothing_is_readable_beyond_the_owner_under_any_umask(tmp_path: Path, umask: str) -> None:
    source = tmp_path / "m"
    source.mkdir()
    for name, data in model_files(MB).items():
        (source / name).write_bytes(data)
    command = ("sh", "-c", f'umask {umask}; exec "$@"', "sh", *SERVE)
    daemon = DaemonProcess(tmp_path / "d", models={"m": {"source": f"file://{source}"}}, command=command)
    daemon.state_dir.mkdir()
    daemon.state_dir.chmod(0o755)  # as an operator, or a service manager, makes it
    with daemon:
        with cached_client.connect(str(daemon.socket)) as cache, cache.attach("m", wait=True):
            pass
        daemon.restart()  # so that what is written at the end is there, too
        with cached_client.connect(str(daemon.socket)) as cache, cache.attach("m", wait=True):
            everything = [*found(daemon.state_dir), *found(daemon.l2_dir), *found(daemon.socket.parent)]
            assert len(everything) > 10
            for path, kind, mode in everything:
                assert not mode & ~allowed(daemon, path, kind), f"{path} has mode {mode:04o} under umask {umask}"
            for folder in (daemon.state_dir, daemon.l2_dir):
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert {stat.S_IMODE(segment.stat().st_mode) for segment in daemon.segments()} == {0o600}
