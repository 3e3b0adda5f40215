"""A client for tests that runs as another user, in a process of its own. JSON lines both ways. Needs root.

``python -m tests.integration.user_process SOCKET UID GID [GROUP…]``. It loads everything as root and gives its rights
up before it connects: the interpreter may lie where that user cannot read.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

import cached_client
import cached_client.descriptors
import cached_client.numpy
from cached_client._proto import cached_pb2 as pb
from cached_client._proto import cached_pb2_grpc

_LOADED_LATER = ("cached_client.cache", "cached_client.numpy", "google.rpc.error_details_pb2", "google.rpc.status_pb2")
_TIMEOUT_S = 60
_DETAILS = "grpc-status-details-bin"


class _User:
    def __init__(self, target: str) -> None:
        self._target = target
        self._cache = cached_client.connect(target)
        self._channel = grpc.insecure_channel(f"unix:{target}")
        self._held: list[Any] = []
        self._stack = ExitStack()

    def call(self, method: str, limit: int = 1000, within_s: float = _TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """What a method answers and how it ends; of a stream what comes in time, and at most ``limit`` messages."""
        message = json_format.ParseDict(request, getattr(pb, f"{method}Request")())
        stub = cached_pb2_grpc.CacheServiceStub(self._channel)
        answers: list[Any] = []
        try:
            answer: Any = getattr(stub, method)(message, timeout=within_s)
            if hasattr(answer, "__next__"):
                for item in answer:
                    answers.append(json_format.MessageToDict(item))
                    if len(answers) >= limit:
                        answer.cancel()
                        break
            else:
                answers.append(json_format.MessageToDict(answer))
        except grpc.RpcError as caught:
            error: Any = caught
            trailing = {key: value.hex() for key, value in error.trailing_metadata() or () if key == _DETAILS}
            return {"answers": answers, "code": error.code().name, "message": error.details(), **trailing}
        return {"answers": answers, "code": "OK"}

    def attach(self, ref: str) -> dict[str, str]:
        """Digests of its files, through the client and the descriptors that it fetches; the lease is held."""
        model = self._cache.attach(ref, wait=True, timeout_s=_TIMEOUT_S)
        self._held.append(model)
        return {path: hashlib.sha256(model.view(path)).hexdigest() for path in model.files}

    def release(self) -> None:
        while self._held:
            self._held.pop().close()

    def fetch(self, token: str) -> str:
        """What the descriptor socket says to a token; empty if it gives a descriptor."""
        path = cached_client.descriptors.locate("", Path(self._target).with_name("cached-fd.sock"))
        try:
            with cached_client.descriptors.DescriptorClient(path) as client:
                for _, descriptor in client.fetch(token, [0]):
                    os.close(descriptor)
        except cached_client.CacheError as error:
            return f"{error.reason}: {error.message} ({error.hint}) {error.fields}"
        return ""

    def listdir(self, path: str) -> list[str] | str:
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            return type(error).__name__

    def connect(self, count: int) -> list[str]:
        """So many connections of calls, each with one call on it; how those ended."""

        def one(_: int) -> str:
            channel = grpc.insecure_channel(f"unix:{self._target}", options=[("grpc.use_local_subchannel_pool", 1)])
            self._stack.callback(channel.close)
            try:
                cached_pb2_grpc.CacheServiceStub(channel).List(pb.ListRequest(), timeout=_TIMEOUT_S)
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
            return "OK"

        return [one(number) for number in range(count)]

    def disconnect(self) -> None:
        self._stack.close()

    def open_streams(self, method: str, count: int, **request: Any) -> dict[str, Any]:
        """So many streams at the same time, each up to its first message; how those that were refused were."""
        message = json_format.ParseDict(request, getattr(pb, f"{method}Request")())
        stub = cached_pb2_grpc.CacheServiceStub(self._channel)
        calls = [getattr(stub, method)(message) for _ in range(count)]
        refused = []
        for call in calls:
            try:
                next(call)
            except grpc.RpcError as error:
                refused.append(f"{error.code().name}: {error.details()}")
            else:
                self._stack.callback(call.cancel)
        return {"open": count - len(refused), "refused": refused}

    def flood(self, calls: int, width: int) -> dict[str, int]:
        """So many calls, ``width`` at a time, over as many connections; how they ended, by code."""

        def one(number: int) -> str:
            channel = channels[number % width]
            try:
                cached_pb2_grpc.CacheServiceStub(channel).List(pb.ListRequest(), timeout=_TIMEOUT_S)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.insecure_channel(f"unix:{self._target}", options=options) for _ in range(width)]
        with ThreadPoolExecutor(width) as pool:
            codes = list(pool.map(one, range(calls)))
        for channel in channels:
            channel.close()
        return {code: codes.count(code) for code in set(codes)}

    def hoard(self, count: int) -> int:
        """So many connections to the descriptor socket that say nothing; how many were not refused at once."""
        path = str(Path(self._target).with_name("cached-fd.sock"))
        kept = 0
        for _ in range(count):
            connection = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(_TIMEOUT_S)
            connection.connect(path)
            connection.send(b'{"token": "none", "files": [0]}')
            kept += b"PERMISSION_DENIED" in connection.recv(65536)
        return kept

    def health(self) -> str:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> None:
    target, uid, gid, *groups = sys.argv[1:]
    for module in _LOADED_LATER:
        import_module(module)
    os.setgroups([int(group) for group in groups])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    user = _User(target)
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(user, request.pop("do"))
        try:
            answer: dict[str, Any] = {"ok": method(**request)}
        except cached_client.CacheError as error:
            answer = {"error": error.reason, "message": error.message, "fields": error.fields}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
