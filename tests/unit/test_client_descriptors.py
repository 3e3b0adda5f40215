"""The client of the descriptor socket, against answers of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cached_client import descriptors
from cached_client.descriptors import FILES_PER_REQUEST, DescriptorClient, locate
from cached_client.errors import CacheError, DaemonUnavailableError, NotFoundError, NotReadyError
from tests.unit.client_support import without_rights


@contextmanager
def answering(path: Path, answer):
    """A socket that gives each request to ``answer(connection, request)``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve():
        connection, _ = listener.accept()
        with connection:
            while packet := connection.recv(1 << 16):
                if answer(connection, json.loads(packet)) is False:
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
        listener.close()


def send(connection, request, files=None, count=None):
    """Answers with descriptors of memory files that hold the index they stand for."""
    files = request["files"] if files is None else files
    made = [os.memfd_create(str(index)) for index in request["files"][:count]]
    for descriptor, index in zip(made, request["files"], strict=False):
        os.write(descriptor, str(index).encode())
    socket.send_fds(connection, [json.dumps({"files": files}).encode()], made)
    for descriptor in made:
        os.close(descriptor)


def test_descriptors_come_in_order_in_batches_and_are_not_inherited(tmp_path: Path) -> None:
    requests = []

    def answer(connection, request):
        requests.append(request)
        send(connection, request)

    with answering(tmp_path / "s", answer), DescriptorClient(tmp_path / "s") as client:
        for index, descriptor in client.fetch("secret", list(range(100))):
            assert os.pread(descriptor, 9, 0) == str(index).encode()
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)
    assert [len(request["files"]) for request in requests] == [FILES_PER_REQUEST, 100 - FILES_PER_REQUEST]
    assert {request["token"] for request in requests} == {"secret"}


def test_what_was_not_taken_is_closed(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    with answering(tmp_path / "s", send), DescriptorClient(tmp_path / "s") as client:
        fetching = client.fetch("t", [0, 1, 2])
        _, taken = next(fetching)
        fetching.close()
        os.close(taken)
    assert psutil.Process().num_fds() == before


def refuse(connection, request):
    error = {"reason": "NOT_FOUND", "message": "no such lease", "hint": "attach again", "fields": {"ref": "m"}}
    connection.send(json.dumps({"error": error}).encode())


def hang_up(connection, request):
    return False


BAD = {
    "refused": (refuse, NotFoundError, "no such lease"),
    "closed": (hang_up, NotReadyError, "closed"),
    "not JSON": (lambda connection, request: connection.send(b"hello") and None, CacheError, "0 descriptors"),
    "not an object": (lambda connection, request: connection.send(b"[]") and None, CacheError, "0 descriptors"),
    "too few": (lambda connection, request: send(connection, request, count=1), CacheError, "1 descriptors for 2"),
    "other files": (lambda connection, request: send(connection, request, files=[1, 0]), CacheError, "2 descriptors"),
    "too long": (lambda connection, request: connection.send(b"x" * 100_000) and None, CacheError, "0 descriptors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_an_error_and_leaks_nothing(tmp_path: Path, case: str) -> None:
    answer, kind, says = BAD[case]
    before = psutil.Process().num_fds()
    with (
        answering(tmp_path / "s", answer),
        DescriptorClient(tmp_path / "s") as client,
        pytest.raises(kind, match=says),
    ):
        list(client.fetch("t", [0, 1]))
    assert psutil.Process().num_fds() == before


def test_too_many_open_files_says_so(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def answer(connection, request):
        made = [os.memfd_create("x") for _ in request["files"]]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(made) + 1, limits[1]))  # as if this process were full
        socket.send_fds(connection, [json.dumps({"files": request["files"]}).encode()], made)
        eaten.extend(made)

    eaten: list[int] = []
    try:
        with answering(tmp_path / "s", answer), DescriptorClient(tmp_path / "s") as client:
            with pytest.raises(CacheError, match="more open files") as caught:
                list(client.fetch("t", list(range(8))))
            assert "ulimit" in caught.value.hint
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in eaten:
            os.close(descriptor)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailableError, match=str(tmp_path)):
        DescriptorClient(tmp_path / "none")


def test_the_announced_path_counts_where_it_exists(tmp_path: Path) -> None:
    here = tmp_path / "d.sock"
    here.touch()
    assert locate(str(here), Path("/elsewhere/cached.sock")) == here
    assert locate("/not/in/this/container/d.sock", tmp_path / "cached.sock") == tmp_path / "d.sock"


def test_an_announced_path_that_may_not_be_looked_at_is_none(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0)
    with without_rights():
        assert locate(str(private / "d.sock"), tmp_path / "cached.sock") == tmp_path / "d.sock"


def test_who_finds_no_place_asks_again_on_another_connection(tmp_path: Path) -> None:
    full = {"reason": "UNAVAILABLE", "message": "too many connections", "hint": "", "fields": {"uid": "0"}}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def serve():
        told, _ = listener.accept()
        with told:
            told.recv(1 << 16)
            told.send(json.dumps({"error": full}).encode())
        reset, _ = listener.accept()
        with reset:
            reset.recv(1, socket.MSG_PEEK)  # what was not read resets it
        served, _ = listener.accept()
        with served:
            send(served, json.loads(served.recv(1 << 16)))
            served.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    before = psutil.Process().num_fds()
    with DescriptorClient(tmp_path / "s") as client:
        ((_, descriptor),) = client.fetch("t", [7])
        assert os.pread(descriptor, 9, 0) == b"7"
        os.close(descriptor)
    thread.join(20)
    listener.close()
    assert psutil.Process().num_fds() < before + 1


def test_who_never_finds_a_place_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:  # nobody is accepted, and before long nobody may wait for it
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                waiting[-1].connect(str(tmp_path / "s"))
        before = psutil.Process().num_fds()
        with pytest.raises(NotReadyError, match=r"no place for one more connection for 0\.2 s"):
            DescriptorClient(tmp_path / "s")
        assert psutil.Process().num_fds() == before
    for connection in waiting:
        connection.close()


def test_whose_connections_are_all_closed_unread_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "ANSWER_S", 0.2)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    listener.settimeout(0.05)
    ended = threading.Event()

    def serve():
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    with DescriptorClient(tmp_path / "s") as client, pytest.raises(NotReadyError, match="no place"):
        list(client.fetch("t", [7]))
    ended.set()
    thread.join(20)
    listener.close()
