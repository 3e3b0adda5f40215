"""The descriptor socket: tokens for descriptors, and what a hostile or careless peer cannot do."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cached.access import AccessList, AccessPolicy, Caller
from cached.errors import LimitExceededError
from cached.rpc.callers import caller_of
from cached.rpc.descriptors import FILES_LIMIT, REQUEST_LIMIT_BYTES, DescriptorServer, Limits
from cached.rpc.peers import container_of
from cached.rpc.sockets import descriptor_socket_path
from cached.rpc.unread import Unread
from cached.types import Peer
from tests.unit.rpc_support import FakeEngine


class Worker:
    """A peer on the socket, as a client sees it; blocking calls run in threads so that the server's loop goes on."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.socket.connect(path)

    async def ask(self, request: object) -> tuple[dict[str, Any], list[int]]:
        await self.send(json.dumps(request).encode())
        return await self.answer()

    async def send(self, packet: bytes) -> None:
        await asyncio.to_thread(self.socket.send, packet)

    async def answer(self) -> tuple[dict[str, Any], list[int]]:
        packet, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, self.socket, 1 << 16, FILES_LIMIT)
        return (json.loads(packet) if packet else {}), descriptors

    async def is_closed(self) -> bool:
        try:
            return await asyncio.to_thread(self.socket.recv, 1 << 16) == b""
        except ConnectionResetError:  # what was sent, or the connection itself, was never taken up
            return True


class Place:
    def __init__(self, server: DescriptorServer, engine: FakeEngine) -> None:
        self.server = server
        self.engine = engine
        self.workers: list[Worker] = []

    def worker(self) -> Worker:
        self.workers.append(Worker(self.server.path))
        return self.workers[-1]


@asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[Place]:
    engine = FakeEngine(files=[folder / f"file {index}" for index in range(FILES_LIMIT)])
    for index, path in enumerate(engine.files):
        path.write_text(f"content {index}")
    server = DescriptorServer(engine, str(folder / "cached-fd.sock"), mode=0o600, **options)
    await server.start()
    place = Place(server, engine)
    try:
        yield place
    finally:
        for worker in place.workers:
            worker.socket.close()
        await server.stop()


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_path_is_beside_the_socket() -> None:
    assert descriptor_socket_path("/run/cached/cached.sock") == "/run/cached/cached-fd.sock"


async def test_a_token_buys_descriptors_in_order_for_the_peer_that_the_kernel_names(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        answer, descriptors = await it.worker().ask({"token": "secret", "files": [1, 0]})
        assert answer == {"files": [1, 0]}
        assert [os.read(descriptor, 99) for descriptor in descriptors] == [b"content 1", b"content 0"]
        for descriptor in descriptors:
            os.close(descriptor)
        process = Path("/proc/self/comm").read_text().strip()
        container = container_of(Path("/proc/self/cgroup").read_text())
        peer = Peer(os.getpid(), os.geteuid(), os.getegid(), process, container)
        assert it.engine.calls == [("open_descriptors", "secret", [1, 0], peer)]


async def test_the_daemon_keeps_no_descriptor_that_it_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        worker = it.worker()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            _, received = await worker.ask({"token": "secret", "files": [*range(FILES_LIMIT)]})
            assert len(received) == FILES_LIMIT
            for descriptor in received:
                os.close(descriptor)
        worker.socket.close()
        await it.server.stop()
        assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_wrong_token_is_told_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        worker = it.worker()
        answer, descriptors = await worker.ask({"token": "wrong", "files": [0]})
        trace_id = answer["error"]["fields"].pop("trace_id")
        assert re.fullmatch("[0-9a-f]{32}", trace_id), "it leads to the line in the log"
        assert answer == {
            "error": {"reason": "NOT_FOUND", "message": "no such lease", "hint": "attach again", "fields": {}}
        }
        assert descriptors == []
        answer, descriptors = await worker.ask({"token": "secret", "files": [0]})
        assert answer == {"files": [0]}
        os.close(descriptors[0])


@pytest.mark.parametrize(
    "packet",
    [
        b"\xff\xfe garbage",
        b"[" * 9000,
        b"[]",
        b"{}",
        json.dumps({"token": 5, "files": [0]}).encode(),
        json.dumps({"token": "secret", "files": []}).encode(),
        json.dumps({"token": "secret", "files": [0] * (FILES_LIMIT + 1)}).encode(),
        json.dumps({"token": "secret", "files": [-1]}).encode(),
        json.dumps({"token": "secret", "files": [1, 0, 1]}).encode(),
        json.dumps({"token": "secret", "files": [True]}).encode(),
        json.dumps({"token": "secret", "files": [0], "more": "x" * REQUEST_LIMIT_BYTES}).encode(),
    ],
    ids=lambda packet: packet[:24].decode("ascii", "replace"),
)
async def test_garbage_ends_only_its_own_connection(tmp_path: Path, packet: bytes) -> None:
    async with serving(tmp_path) as it:
        good, bad = it.worker(), it.worker()
        await bad.send(packet)
        answer, _ = await bad.answer()
        assert answer["error"]["reason"] == "INVALID_REQUEST"
        assert await bad.is_closed()
        assert it.engine.calls == []
        answer, descriptors = await good.ask({"token": "secret", "files": [0]})
        assert answer == {"files": [0]}
        os.close(descriptors[0])


async def test_an_engine_that_breaks_tells_nothing_of_itself(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        it.engine.error = RuntimeError("inner secret")
        answer, _ = await it.worker().ask({"token": "secret", "files": [0]})
        assert answer["error"]["reason"] == "INTERNAL"
        assert "inner" not in json.dumps(answer)


async def test_descriptors_that_a_peer_sends_are_not_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        worker = it.worker()
        reading, writing = os.pipe()
        request = json.dumps({"token": "secret", "files": [0]}).encode()
        await asyncio.to_thread(socket.send_fds, worker.socket, [request], [writing])
        os.close(writing)
        _, descriptors = await worker.answer()
        assert os.read(reading, 1) == b"", "the write end is open somewhere"
        for descriptor in (*descriptors, reading):
            os.close(descriptor)


async def test_who_is_not_on_the_access_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cached.rpc.descriptors.caller_of", lambda peer, groups: Caller("uid 70001", 70001))
    access = AccessPolicy(AccessList(uids=frozenset({999999})))
    async with serving(tmp_path, access=access) as it:
        worker = it.worker()
        answer, _ = await worker.answer()
        assert answer["error"]["reason"] == "PERMISSION_DENIED"
        assert await worker.is_closed()
        assert it.engine.calls == []


@pytest.mark.parametrize(
    ("access", "groups", "allowed"),
    [
        (AccessList(), (), False),
        (AccessList(uids=frozenset({70001})), (), True),
        (AccessList(uids=frozenset({70009})), (), False),
        (AccessList(gids=frozenset({70002})), (), True),
        (AccessList(gids=frozenset({70003})), (70003, 1), True),
        (AccessList(gids=frozenset({70004})), (70003,), False),
    ],
)
def test_access_goes_by_user_group_or_supplementary_group(
    access: AccessList, groups: tuple[int, ...], allowed: bool
) -> None:
    assert access.allows(caller_of(Peer(1, 70001, 70002), groups)) is allowed


async def test_one_user_cannot_take_all_connections(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(connections_per_uid=2)) as it:
        first, second = it.worker(), it.worker()
        for worker in (first, second):
            _, descriptors = await worker.ask({"token": "secret", "files": [0]})
            os.close(descriptors[0])
        answer, _ = await it.worker().answer()
        assert answer["error"]["reason"] == "LIMIT_EXCEEDED"
        assert answer["error"]["fields"]["setting"] == "limits.descriptor_connections_per_uid"
        first.socket.close()
        while True:  # the server has to see that it went
            answer, descriptors = await it.worker().ask({"token": "secret", "files": [0]})
            if "files" in answer:
                os.close(descriptors[0])
                return


async def test_an_idle_connection_is_ended(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(idle_timeout_s=0.05)) as it:
        assert await it.worker().is_closed()


ALL = {"token": "secret", "files": [*range(FILES_LIMIT)]}


async def asked(worker: Worker) -> dict[str, Any]:
    """What it is answered; its descriptors are closed."""
    answer, descriptors = await worker.ask(ALL)
    assert len(descriptors) == len(answer.get("files", ()))
    for descriptor in descriptors:
        os.close(descriptor)
    return answer


def failures(it: Place) -> dict[str, float]:
    counters = it.engine.failures._metrics.counters()
    return {key: value for key, value in counters.items() if key.startswith("cached_failures_total") and value}


async def test_an_answer_comes_only_once_the_one_before_was_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        worker = it.worker()
        for _ in range(5):
            await worker.send(json.dumps(ALL).encode())
        for asked in range(1, 6):
            answer, descriptors = await worker.answer()
            assert len(it.engine.calls) <= asked + 1
            assert answer == {"files": ALL["files"]}
            for descriptor in descriptors:
                os.close(descriptor)
        assert it.server.used_ratios()["all_descriptor_connections"] == 1 / it.server._limits.connections


async def test_who_holds_descriptors_back_gets_no_more_and_is_told(tmp_path: Path) -> None:
    limits = Limits(unread=4 * FILES_LIMIT, room_timeout_s=0.05)
    async with serving(tmp_path, limits=limits) as it:
        hoarder, other = it.worker(), it.worker()
        await hoarder.send(json.dumps(ALL).encode())
        while not it.engine.calls:
            await asyncio.sleep(0.01)
        assert it.server.used_ratios()["all_unread_descriptors"] == pytest.approx(1 / 4)
        answer = await asked(other)
        assert answer == {"files": ALL["files"]}
        await hoarder.send(json.dumps(ALL).encode())
        third = it.worker()
        await third.send(json.dumps(ALL).encode())
        while len(it.engine.calls) < 3:
            await asyncio.sleep(0.01)
        answer = await asked(other)
        assert answer["error"]["reason"] == "LIMIT_EXCEEDED"
        assert answer["error"]["fields"]["setting"] == "RLIMIT_NOFILE"
        assert failures(it) == {'cached_failures_total{reason="LIMIT_EXCEEDED"}': 1}
        hoarder.socket.close()
        answer = await asked(other)
        assert answer == {"files": ALL["files"]}, "what it held is free"


async def test_who_does_not_read_is_ended_and_counts_until_it_is_gone(tmp_path: Path) -> None:
    limits = Limits(unread=2 * FILES_LIMIT, idle_timeout_s=0.1, room_timeout_s=0.05)
    async with serving(tmp_path, limits=limits) as it:
        hoarder = it.worker()
        await hoarder.send(json.dumps(ALL).encode())
        while not failures(it):
            await asyncio.sleep(0.01)
        assert failures(it) == {'cached_failures_total{reason="INVALID_REQUEST"}': 1}
        assert it.server.used_ratios()["unread_descriptors"] == 1
        answer = await asked(it.worker())
        assert answer["error"]["reason"] == "LIMIT_EXCEEDED"
        _, descriptors = await hoarder.answer()
        assert len(descriptors) == FILES_LIMIT, "what was sent can still be read"
        for descriptor in descriptors:
            os.close(descriptor)
        assert await hoarder.is_closed()
        answer = await asked(it.worker())
        assert answer == {"files": ALL["files"]}


async def test_users_who_hold_back_leave_room_for_one_who_does_not() -> None:
    unread = Unread(1024)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(64)]
    senders = iter([pair[0] for pair in pairs])
    try:
        for uid in (1, 2, 3):
            with pytest.raises(LimitExceededError):
                while True:
                    sender = next(senders)
                    await unread.take(sender, Peer(1, uid, uid), 64, 0)
                    sender.send(b"descriptors")
        await unread.take(next(senders), Peer(1, 4, 4), 64, 0)
    finally:
        for pair in pairs:
            for end in pair:
                end.close()


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.EMFILE])
async def test_a_shortage_is_told_and_the_connection_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def short(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    async with serving(tmp_path) as it:
        worker = it.worker()
        with monkeypatch.context() as patched:
            patched.setattr(socket, "send_fds", short)
            answer = await asked(worker)
        assert answer["error"]["reason"] == "UNAVAILABLE"
        assert os.strerror(number) in answer["error"]["message"]
        assert failures(it) == {'cached_failures_total{reason="UNAVAILABLE"}': 1}
        assert await asked(worker) == {"files": ALL["files"]}


async def test_that_no_connection_can_be_taken_is_told_once_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cached.listening._AGAIN_S", 0.01)
    async with serving(tmp_path) as it:
        loop, tried = asyncio.get_running_loop(), 0
        real = loop.sock_accept

        async def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
            nonlocal tried
            accepted = await real(listener)
            tried += 1
            if tried <= 3:
                accepted[0].close()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return accepted

        monkeypatch.setattr(loop, "sock_accept", accept)
        it.worker()
        while tried < 4:
            worker = it.worker()
            await asyncio.sleep(0.02)
        answer = await asked(worker)
        assert answer == {"files": ALL["files"]}
        assert failures(it) == {'cached_failures_total{reason="UNAVAILABLE"}': 1}
        events = it.engine.failures._events.recent
        assert [event.kind for event in events] == ["descriptors.accept_failed"]


async def test_one_user_has_half_of_all_connections_at_most(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(connections=4)) as it:
        for _ in range(2):
            await asked(it.worker())
        answer, _ = await it.worker().answer()
        assert answer["error"]["reason"] == "UNAVAILABLE", "which the client takes for: try again"


async def test_the_socket_has_its_mode_and_goes_with_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        assert stat.S_IMODE(os.stat(it.server.path).st_mode) == 0o600
        worker = it.worker()
        await it.server.stop()
        assert not os.path.exists(it.server.path)
        assert await worker.is_closed()
