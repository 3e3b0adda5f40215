"""Locks, folders, logs and the service manager's protocol."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import json
import logging
import os
import socket
import stat
from pathlib import Path
from typing import cast

import pytest
import structlog

from cached import logs
from cached.cache import ModelCache
from cached.daemon import _Daemon
from cached.errors import AlreadyRunningError, ConfigError
from cached.rpc import sockets
from cached.sdnotify import Notifier
from tests.unit.rpc_support import FakeEngine


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = sockets.FileLock(path, "the state folder")
    with pytest.raises(AlreadyRunningError, match=f"pid {os.getpid()}") as caught:
        sockets.FileLock(path, "the state folder")
    assert caught.value.fields == {"path": path, "holder_pid": str(os.getpid())}
    first.release()
    first.release()
    sockets.FileLock(path, "the state folder").release()


def test_the_lock_is_not_inherited_and_follows_no_link(tmp_path: Path) -> None:
    lock = sockets.FileLock(str(tmp_path / "lock"), "it")
    assert fcntl.fcntl(lock._descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    lock.release()
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(ConfigError):
        sockets.FileLock(str(tmp_path / "link"), "it")


def test_folders_are_made_with_their_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        sockets.prepare_directory(str(tmp_path / "a" / "b"), 0o750, "state folder", "daemon.state_dir")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750
    sockets.prepare_directory(str(tmp_path / "a" / "b"), 0o700, "state folder", "daemon.state_dir")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750, "an operator's mode is kept"


@pytest.mark.parametrize("before", [0o700, 0o750, 0o755, 0o711])
def test_the_state_folder_is_closed_to_others_also_where_it_was_there(tmp_path: Path, before: int) -> None:
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(before)
    sockets.prepare_private_directory(str(path), "state folder", "daemon.state_dir")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("before", [0o770, 0o777, 0o1777, 0o702])
def test_a_state_folder_that_others_could_write_to_is_refused_with_the_command(tmp_path: Path, before: int) -> None:
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(before)
    with pytest.raises(ConfigError, match=f"the state folder {path} has mode {before:04o}: others may write") as caught:
        sockets.prepare_private_directory(str(path), "state folder", "daemon.state_dir")
    assert caught.value.hint.endswith(f"chmod 0700 {path}")
    assert caught.value.fields == {"key": "daemon.state_dir", "value": str(path)}
    assert stat.S_IMODE(path.stat().st_mode) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a folder to another user")
def test_a_state_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to uid 65534, and this is uid 0") as caught:
        sockets.prepare_private_directory(str(path), "state folder", "daemon.state_dir")
    assert f"chown -R 0 {path}" in caught.value.hint


def test_what_cannot_be_a_folder_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError) as caught:
            sockets.prepare_directory(str(path), 0o700, "state folder", "daemon.state_dir")
        assert caught.value.fields["key"] == "daemon.state_dir"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a folder to another user")
def test_a_folder_that_another_user_laid_into_a_public_one_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    planted = tmp_path / "cached-0"
    planted.mkdir()
    os.chown(planted, 65534, 65534)
    with pytest.raises(ConfigError, match="another user"):
        sockets.prepare_directory(str(planted), 0o700, "socket's folder", "daemon.socket")


def test_groups_by_name_and_number() -> None:
    assert sockets.group_id("", "access.socket_group") == -1
    assert sockets.group_id("70001", "access.socket_group") == 70001
    assert sockets.group_id("root", "access.socket_group") == 0
    for name in ("no-such-group", "²", "a\0b", "4294967295", "9" * 5000):
        with pytest.raises(ConfigError, match=r"access\.socket_group"):
            sockets.group_id(name, "access.socket_group")


def test_logs_are_json_lines_of_one_shape_for_everybody() -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    structlog.get_logger("cached.x").info("pull.ready", model="tiny", seconds=0.5)
    structlog.get_logger("cached.x").debug("not.shown")
    logging.getLogger("botocore").warning("from %s", "elsewhere")
    logging.getLogger("botocore").info("chatter")
    try:
        raise ValueError("inner")
    except ValueError:
        structlog.get_logger("cached.x").exception("it.failed")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["pull.ready", "from elsewhere", "it.failed"]
    assert lines[0]["model"] == "tiny"
    assert {"timestamp", "level", "logger"} <= set(lines[0]) & set(lines[1])
    assert lines[0]["timestamp"].endswith("Z")
    assert "ValueError: inner" in lines[2]["exception"]


def test_a_log_that_cannot_be_written_fails_nobody() -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), text)

    logs.configure("info", "json", FullDisk())
    structlog.get_logger("cached.x").info("a")
    closed = io.StringIO()
    logs.configure("info", "json", closed)
    closed.close()
    structlog.get_logger("cached.x").error("b")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_not_logged(log_format: str) -> None:
    stream = io.StringIO()
    logs.configure("debug", log_format, stream)
    log = structlog.get_logger("cached.x")
    log.warning("a", token="SECRET1", aws_secret_access_key="SECRET2", lease_token="SECRET3", tokenizer="shown1")
    log.warning("b", uri="s3://key:SECRET4@host/bucket", url="https://h/o?X-Amz-Signature=SECRET5&x=shown2")
    log.warning("b", url="https://h/o%3Fsig%3DSECRET7")
    password = "SECRET6"
    try:
        raise ValueError(f"GET https://user:{password}@host/")
    except ValueError:
        log.exception("c")
    assert "SECRET" not in stream.getvalue()
    assert "shown1" in stream.getvalue()
    assert "shown2" in stream.getvalue()


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"@cached-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if abstract else address)
        manager.settimeout(10)
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "4000000"})
        assert notifier.watchdog_s == 4.0
        notifier.ready("serving\n3 models")
        notifier.reloading()
        notifier.watchdog()
        notifier.extend_timeout(1.5)
        notifier.stopping()
        assert manager.recv(999) == b"READY=1\nSTATUS=serving 3 models"
        assert manager.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(999) == b"WATCHDOG=1"
        assert manager.recv(999) == b"EXTEND_TIMEOUT_USEC=1500000"
        assert manager.recv(999) == b"STOPPING=1"


def test_a_status_of_any_characters_reaches_the_service_manager(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        Notifier(str(tmp_path / "notify")).ready("catalog: \ud800\0 ü")
        assert manager.recv(999) == "READY=1\nSTATUS=catalog: \\ud800\\0 ü".encode()


def test_without_a_service_manager_nothing_happens(tmp_path: Path) -> None:
    Notifier.from_environment({}).ready()
    Notifier.from_environment({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    other = {"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert Notifier.from_environment(other).watchdog_s is None


async def test_what_nobody_caught_is_told() -> None:
    daemon = object.__new__(_Daemon)
    daemon._engine = cast("ModelCache", FakeEngine())
    daemon._on_stray(asyncio.get_running_loop(), {"message": "a task was lost"})
    events = cast("FakeEngine", daemon._engine).failures._events.recent
    assert [event.kind for event in events] == ["internal.error"]
