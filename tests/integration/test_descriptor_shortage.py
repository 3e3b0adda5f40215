"""Descriptors and connections that others hold back, as a daemon meets them that is not root and may open few files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.harness import PAGES
from tests.integration.support import ROOT
from tests.integration.users import ANN, BEN, as_uid, needs_root, public_folder, shared_daemon

pytestmark = needs_root
FILES = 1024
BATCH = 64
SERVED_BY = 61009
ASKS = 40


@contextmanager
def served_without_rights() -> Iterator[Path]:
    with public_folder() as folder:
        os.chown(folder, SERVED_BY, SERVED_BY)
        path = folder / "fd.sock"
        with subprocess.Popen(
            [sys.executable, "-m", "tests.integration.descriptor_process", str(path), str(SERVED_BY), str(FILES)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield path
            process.communicate()


def connect(stack: ExitStack, path: Path, uid: int) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    connection.settimeout(60)
    with as_uid(uid):
        connection.connect(str(path))
    return connection


def ask(connection: socket.socket) -> None:
    connection.send(json.dumps({"token": "secret", "files": [*range(BATCH)]}).encode(), socket.MSG_NOSIGNAL)


def answered(connection: socket.socket) -> Any:
    packet, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, BATCH)
    for descriptor in descriptors:
        os.close(descriptor)
    return json.loads(packet), len(descriptors)


@pytest.mark.parametrize("connections", [1, ASKS])
def test_who_asks_for_descriptors_and_never_reads_keeps_nobody_from_theirs(connections: int) -> None:
    with served_without_rights() as path, ExitStack() as stack:
        hoarders = [connect(stack, path, ANN) for _ in range(connections)]
        for number in range(ASKS):
            ask(hoarders[number % connections])
        for _ in range(3):
            other = connect(stack, path, BEN)
            for _ in range(3):
                ask(other)
                answer, count = answered(other)
                assert count == BATCH, answer


def test_silent_connections_leave_attaches_and_health_to_others() -> None:
    """Of HTTP, of the descriptor socket and of calls, each more than the daemon may have files."""
    with shared_daemon({"open": {}}, settings=PAGES, around=("prlimit", f"--nofile={FILES}:{FILES}")) as made:
        daemon, as_user = made
        ben = as_user(BEN)
        http = urlsplit(daemon.http)
        assert http.hostname
        assert http.port
        with ExitStack() as stack:
            for _ in range(FILES):
                stack.enter_context(socket.create_connection((http.hostname, http.port)))
            for kind, path in ((socket.SOCK_SEQPACKET, daemon.descriptor_socket), (socket.SOCK_STREAM, daemon.socket)):
                for _ in range(FILES):
                    silent = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
                    with as_uid(ANN):
                        silent.connect(str(path))
            assert ben.ask("health") == "SERVING"
            assert ben.ask("attach", ref="open")
            assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < FILES
            ben.ask("release")
        events = [event.get("event") for event in daemon.log_events()]
        assert not [event for event in events if str(event).endswith("accept_failed")]
