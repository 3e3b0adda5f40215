"""A small stand-in for the daemon, for the tests of programs that use this package.

It speaks the real protocol over real sockets and serves real memory files, so what is tested is the client as it runs.
It moves, checks and evicts nothing: the test says what arrives, and when::

    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("llama", {"model.safetensors": content})
        with cache.attach("llama") as model:
            ...
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import grpc
from google.rpc import error_details_pb2, status_pb2

from cached_client._proto import cached_pb2 as pb
from cached_client.errors import CacheError, NotFoundError
from cached_client.patterns import WEIGHTS_SUFFIX, matched
from cached_client.safetensors_header import parse_header

R = TypeVar("R")
T = TypeVar("T")

_THREADS = 32
_REFUSED = grpc.StatusCode.FAILED_PRECONDITION


@dataclass(slots=True)
class _Model:
    name: str
    revision: str
    contents: dict[str, bytes]
    segments: dict[str, int] = field(default_factory=dict)
    news: list[pb.AttachResponse | CacheError] = field(default_factory=list)


class FakeDaemon:
    """Serves models from memory. Any thread may use it."""

    def __init__(self, directory: Path) -> None:
        """Its sockets will be in ``directory``."""
        self.socket: Path = directory / "cached.sock"
        self.descriptor_socket: Path = directory / "descriptors.sock"
        self.announced_descriptor_socket: str = str(self.descriptor_socket)
        self.directory_view: Path | None = None
        self.attach_requests: list[pb.AttachRequest] = []
        self.cold_starts: list[pb.ColdStart] = []
        self._changed = threading.Condition()
        self._models: dict[str, _Model] = {}
        self._leases: dict[str, _Model] = {}
        self._server: grpc.Server | None = None
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def target(self) -> str:
        """What `connect` takes."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def lease_count(self) -> int:
        """Leases that are held now."""
        with self._changed:
            return len(self._leases)

    # What it has.

    def add(self, name: str, files: Mapping[str, bytes], *, arrived: bool = True) -> str:
        """Gives it a model, wholly there, or with nothing of it there yet; returns the revision."""
        if name in self._models:
            self.remove(name)
        contents = dict(files)
        digest = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()
        model = _Model(name, digest, contents)
        for path, content in contents.items():
            model.segments[path] = os.memfd_create("segment", os.MFD_CLOEXEC)
            os.ftruncate(model.segments[path], len(content))
        with self._changed:
            self._models[name] = model
        if arrived:
            for path, content in contents.items():
                self.announce(name, path, 0, len(content))
            self.complete(name)
        return model.revision

    def announce(self, name: str, path: str, begin: int, end: int) -> None:
        """Bytes ``[begin, end)`` of a file arrive."""
        model = self._models[name]
        os.pwrite(model.segments[path], model.contents[path][begin:end], begin)
        index = list(model.contents).index(path)
        item = pb.RangesReady.Range(file_index=index, offset_bytes=begin, length_bytes=end - begin)
        self._tell(model, pb.AttachResponse(ranges_ready=pb.RangesReady(ranges=[item])))

    def complete(self, name: str) -> None:
        """The whole model has arrived and was checked."""
        model = self._models[name]
        report = pb.Complete(
            from_level=pb.LEVEL_L3,
            origin_bytes=sum(map(len, model.contents.values())),
            load_s=0.5,
            checked_by="first-seen",
        )
        self._tell(model, pb.AttachResponse(complete=report))

    def fail(self, name: str, error: CacheError) -> None:
        """The load fails: every attach ends with this error."""
        self._tell(self._models[name], error)

    def damage(self, name: str, path: str, offset_bytes: int, length_bytes: int) -> None:
        """Bytes of a file are found damaged."""
        model = self._models[name]
        index = list(model.contents).index(path)
        damaged = pb.Damaged(file_index=index, offset_bytes=offset_bytes, length_bytes=length_bytes)
        self._tell(model, pb.AttachResponse(damaged=damaged))

    def remove(self, name: str) -> None:
        """It does not have the model any more."""
        for descriptor in self._models.pop(name).segments.values():
            os.close(descriptor)

    # Its life.

    def start(self) -> None:
        """Answers on its sockets."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.descriptor_socket))
        self._listener.listen()
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), name="fake-descriptors", daemon=True
        )
        self._acceptor.start()
        self._server = grpc.server(ThreadPoolExecutor(_THREADS))
        self._server.add_generic_rpc_handlers([self._service()])
        self._server.add_insecure_port(self.target)
        self._server.start()

    def stop(self) -> None:
        """Is gone, as after a kill; what it has stays for the next `start`. Idempotent."""
        if self._server is None or self._listener is None or self._acceptor is None:
            return
        self._server.stop(0).wait()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._server = self._listener = self._acceptor = None
        for path in (self.socket, self.descriptor_socket):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for name in list(self._models):
            self.remove(name)

    def _tell(self, model: _Model, news: pb.AttachResponse | CacheError) -> None:
        with self._changed:
            model.news.append(news)
            self._changed.notify_all()

    def _find(self, ref: str) -> _Model:
        name, _, revision = ref.partition("@")
        model = self._models.get(name)
        if model is None or not model.revision.startswith(revision):
            raise NotFoundError(f"there is no model {ref!r}", hint="add it", ref=ref)
        return model

    # Its methods.

    def _service(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Attach": stream(_guarded(self._attach), pb.AttachRequest.FromString, pb.AttachResponse.SerializeToString),
            "Pull": stream(_guarded(self._pull), pb.PullRequest.FromString, pb.PullResponse.SerializeToString),
            "Detach": unary(self._detach, pb.DetachRequest.FromString, pb.DetachResponse.SerializeToString),
            "List": unary(self._list, pb.ListRequest.FromString, pb.ListResponse.SerializeToString),
            "Describe": unary(self._describe, pb.DescribeRequest.FromString, pb.DescribeResponse.SerializeToString),
            "ReportColdStart": unary(
                self._report_cold_start,
                pb.ReportColdStartRequest.FromString,
                pb.ReportColdStartResponse.SerializeToString,
            ),
            "Stats": unary(self._stats, pb.StatsRequest.FromString, pb.StatsResponse.SerializeToString),
        }
        return grpc.method_handlers_generic_handler("cached.v1.CacheService", handlers)

    def _pull(self, request: pb.PullRequest, _: grpc.ServicerContext) -> Iterator[pb.PullResponse]:
        model = self._find(request.ref)
        for phase in (pb.PullProgress.PHASE_RESOLVING, pb.PullProgress.PHASE_READY):
            yield pb.PullResponse(progress=pb.PullProgress(phase=phase, name=model.name, revision=model.revision))

    def _list(self, _: pb.ListRequest, __: grpc.ServicerContext) -> pb.ListResponse:
        return pb.ListResponse(models=[_summary(model) for model in self._models.values()])

    def _describe(self, request: pb.DescribeRequest, _: grpc.ServicerContext) -> pb.DescribeResponse:
        files = [
            pb.FileDetail(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for path, content in self._find(request.ref).contents.items()
        ]
        return pb.DescribeResponse(path=str(self.directory_view or ""), files=files)

    def _stats(self, _: pb.StatsRequest, __: grpc.ServicerContext) -> pb.StatsResponse:
        return pb.StatsResponse(version="fake")

    def _report_cold_start(
        self, request: pb.ReportColdStartRequest, _: grpc.ServicerContext
    ) -> pb.ReportColdStartResponse:
        with self._changed:
            self.cold_starts.append(request.cold_start)
        return pb.ReportColdStartResponse()

    def _detach(self, request: pb.DetachRequest, _: grpc.ServicerContext) -> pb.DetachResponse:
        with self._changed:
            self._leases.pop(request.lease_id, None)
            self._changed.notify_all()
        return pb.DetachResponse()

    def _attach(self, request: pb.AttachRequest, context: grpc.ServicerContext) -> Iterator[pb.AttachResponse]:
        """One attach, from the lease's begin to its end."""
        model = self._find(request.ref)
        selected = _selected(model, request.selection)
        token = secrets.token_hex(16)
        with self._changed:
            self.attach_requests.append(request)
            self._leases[token] = model
        context.add_callback(self._wake)
        try:
            opened = self._opened(model, token)
            opened.selected.MergeFrom(selected or pb.Selected())
            if selected is None:
                opened.ClearField("selected")
            yield pb.AttachResponse(opened=opened)
            for news in self._news(model, token, context):
                answer = pb.AttachResponse()
                answer.CopyFrom(news)
                if news.HasField("complete"):
                    answer.complete.partial = selected is not None
                yield answer
        finally:
            with self._changed:
                self._leases.pop(token, None)
                self._changed.notify_all()

    def _opened(self, model: _Model, token: str) -> pb.Opened:
        files = [
            pb.ModelFile(index=index, path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for index, (path, content) in enumerate(model.contents.items())
        ]
        return pb.Opened(
            lease_id=token,
            token=token,
            name=model.name,
            revision=model.revision,
            files=files,
            descriptor_socket=self.announced_descriptor_socket,
        )

    def _news(self, model: _Model, token: str, context: grpc.ServicerContext) -> Iterator[pb.AttachResponse]:
        told = 0
        while self._wait_for_news(model, told, token, context):
            news = model.news[told]
            told += 1
            if isinstance(news, CacheError):
                raise news
            yield news

    def _wait_for_news(self, model: _Model, told: int, token: str, context: grpc.ServicerContext) -> bool:
        """False when the lease has ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(model.news) > told or not self._holds(token, context))
            return self._holds(token, context)

    def _holds(self, token: str, context: grpc.ServicerContext) -> bool:
        return token in self._leases and context.is_active()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # stopped
            with connection, contextlib.suppress(OSError):
                while packet := connection.recv(16 * 1024):
                    self._answer(connection, json.loads(packet))

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        model = self._leases.get(request["token"])
        if model is None:
            refusal = {"reason": "NOT_FOUND", "message": "no such lease", "hint": "attach again", "fields": {}}
            connection.send(json.dumps({"error": refusal}).encode())
            return
        segments = list(model.segments.values())
        opened = [os.open(f"/proc/self/fd/{segments[index]}", os.O_RDONLY) for index in request["files"]]
        try:
            socket.send_fds(connection, [json.dumps({"files": request["files"]}).encode()], opened)
        finally:
            for descriptor in opened:
                os.close(descriptor)


def _selected(model: _Model, selection: pb.Selection) -> pb.Selected | None:
    """What a selection matches, if only that is to be there."""
    if selection.rest_follows or not (selection.tensors or selection.files):
        return None
    paths = list(model.contents)
    files, missing = matched(selection.files, paths)
    found = [
        (paths.index(path), parse_header(content, len(content), path=path).tensors)
        for path, content in model.contents.items()
        if selection.tensors and path.endswith(WEIGHTS_SUFFIX)
    ]
    names, unmatched = matched(selection.tensors, [name for _, tensors in found for name in tensors])
    if missing or unmatched:
        pattern = selection.files[missing[0]] if missing else selection.tensors[unmatched[0]]
        raise NotFoundError(f"nothing of {model.name} matches {pattern!r}", pattern=pattern)
    chosen = [(index, info) for index, tensors in found for info in tensors.values() if info.name in set(names)]
    return pb.Selected(
        tensors=[pb.Selected.Tensor(file_index=index, **info._asdict()) for index, info in chosen],
        files=[paths.index(path) for path in files],
    )


def _summary(model: _Model) -> pb.ModelSummary:
    return pb.ModelSummary(
        name=model.name,
        revision=model.revision,
        state=pb.REVISION_STATE_READY,
        tier=pb.TIER_AUTO,
        size_bytes=sum(map(len, model.contents.values())),
        file_count=len(model.contents),
    )


def _guarded(
    method: Callable[[R, grpc.ServicerContext], Iterator[T]],
) -> Callable[[R, grpc.ServicerContext], Iterator[T]]:
    """A streaming method whose errors end the call as the daemon's do: a status, and google.rpc.ErrorInfo."""

    def guarded(request: R, context: grpc.ServicerContext) -> Iterator[T]:
        try:
            yield from method(request, context)
        except CacheError as error:
            info = error_details_pb2.ErrorInfo(reason=error.reason, domain="cached.v1", metadata=error.fields)
            info.metadata["hint"] = error.hint
            status = status_pb2.Status(code=_REFUSED.value[0], message=error.message)
            status.details.add().Pack(info)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(_REFUSED, error.message)

    return guarded
