"""Holds a lease: reads the Attach stream in a thread, and takes the lease up again when the daemon was restarted."""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from typing import TYPE_CHECKING

import grpc

from cached_client._proto import cached_pb2 as pb
from cached_client._selected import Selected
from cached_client._trace import trace_metadata
from cached_client.descriptors import DescriptorClient, locate
from cached_client.errors import (
    CacheError,
    DaemonUnavailableError,
    IntegrityError,
    InvalidRequestError,
    LeaseLostError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    daemon_unavailable,
    from_rpc_error,
)
from cached_client.segment import MappedFile
from cached_client.types import DamagedRange, FileInfo, load_report

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Sequence

    from cached_client._arrivals import Arrivals
    from cached_client.connection import Connection

_log = logging.getLogger("cached_client")

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_DETACH_TIMEOUT_S = 2.0
_REASON_TIMEOUT_S = 2.0
_BREAKS = (DaemonUnavailableError, NotReadyError)
"""The daemon is gone for a while."""
_REFUSALS = (NotFoundError, IntegrityError, PermissionDeniedError, InvalidRequestError)
"""It does not have the content any more, has it damaged, or does not let this worker have it: asking again changes
nothing. Any other error (a limit, a mover that would not start, a level that failed) says nothing of the content."""


class Lease:
    """A worker's hold on a revision, for as long as its stream lives.

    **When the stream breaks**, the mappings stay valid and nobody notices. The thread asks for the same revision again,
    with growing, jittered pauses, for as long as it takes. After completion it only takes up the lease (``resume``),
    whatever else goes wrong in the daemon meanwhile: until that says that it does not have the content any more. Then
    the model goes on from its mappings without a lease, and `lost` says so. Before completion it attaches anew, and
    maps those files again that the daemon had to begin anew; any error of the daemon is the answer to who waits.
    """

    def __init__(
        self,
        connection: Connection,
        request: pb.AttachRequest,
        arrivals: Arrivals,
        on_damaged: Callable[[DamagedRange], None] | None,
    ) -> None:
        self._connection = connection
        self._request = request
        self._arrivals = arrivals
        self._on_damaged = on_damaged
        self._thread = threading.Thread(target=self._run, name="cached-lease", daemon=True)
        self._lock = threading.RLock()  # a garbage collection within it may call `cancel`
        self._stopping = threading.Event()
        self._stream: grpc.Call | None = None
        self._fetching: DescriptorClient | None = None
        self._held = False
        self._in_callback = False
        self._delay_s = _FIRST_DELAY_S
        self._process_id = os.getpid()
        self._trace = trace_metadata()  # of whoever attaches: the stream is another thread's
        self._replaced: list[tuple[str, weakref.ref[mmap.mmap]]] = []
        self.opened: pb.Opened | None = None
        self.lost: LeaseLostError | None = None
        self.selected: Selected | None = None

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Ends the lease without waiting for anything: the daemon sees its stream end. Idempotent.

        In a child process it does nothing: the lease is the parent's, and so is what gRPC has of it.
        """
        if os.getpid() != self._process_id:
            return
        with self._lock:
            self._stopping.set()
            stream, fetching = self._stream, self._fetching
        if stream is not None:
            stream.cancel()
        if fetching is not None:
            fetching.interrupt()

    def stop(self) -> None:
        """Ends the lease; when it returns the daemon was told, if it lives. Idempotent."""
        opened = self.opened
        if os.getpid() != self._process_id:
            return
        if opened is not None and self._held and not self._stopping.is_set():
            request = pb.DetachRequest(lease_id=opened.lease_id, token=opened.token)
            try:
                self._connection.call(self._connection.stub.Detach, request, timeout_s=_DETACH_TIMEOUT_S)
            except CacheError as error:
                _log.debug("detach failed, the lease ends with its stream: %s", error)
        self.cancel()
        # The worker's own code is not waited for: it may be waiting for whoever calls this.
        if threading.current_thread() is not self._thread and not self._in_callback:
            self._thread.join()

    def descriptors(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """New read-only descriptors by file index, each the caller's to close. Raises CacheError."""
        opened = self.opened
        if opened is not None and indices:
            with DescriptorClient(locate(opened.descriptor_socket, self._connection.path)) as client:
                yield from client.fetch(opened.token, indices)

    def request(self) -> pb.AttachRequest:
        """What asks for exactly this revision, with the same options and selection, from nothing."""
        request = self._same_request()
        request.resume = request.only_if_resident = False
        request.client_pid = os.getpid()
        return request

    def replaced(self) -> list[tuple[str, mmap.mmap]]:
        """Mappings that a daemon's restart made this lease do without, by path, as far as tensors still use them."""
        alive = ((path, reference()) for path, reference in self._replaced)
        return [(path, region) for path, region in alive if region is not None]

    def _run(self) -> None:
        try:
            self._hold()
        except Exception as error:  # noqa: BLE001 a fault of ours must reach those who wait, not end in a silent thread
            _log.exception("the lease of %s failed", self._request.ref)
            self._arrivals.failed(CacheError(f"the lease of {self._request.ref} failed: {error!r}"))

    def _hold(self) -> None:
        request = self._request
        while True:
            error = self._follow(request)
            if self._stopping.is_set():
                return
            if not self._may_pass(error):
                self._give_up(error)
                return
            _log.log(
                logging.INFO if isinstance(error, _BREAKS) else logging.WARNING,
                "the lease of %s broke, trying again: %s", self._ref(), error,
            )  # fmt: skip
            if self._stopping.wait(self._next_delay_s()):
                return
            request = self._request_again()

    def _may_pass(self, error: CacheError) -> bool:
        """Whether to ask for the lease again after this."""
        if self.opened is None:
            return False
        if self._arrivals.report is None:
            return isinstance(error, _BREAKS)
        return not isinstance(error, _REFUSALS)

    def _follow(self, request: pb.AttachRequest) -> CacheError:
        """Reads one stream to its end, and returns why it ended."""
        try:
            stream = self._connection.stub.Attach(request, metadata=self._trace)
        except ValueError:  # what gRPC says of a channel that another thread has closed meanwhile
            return daemon_unavailable(self._connection.target, "the connection was closed")
        self._trace = None  # a lease that is taken up again is no part of it
        with self._lock:
            self._stream = stream
            if self._stopping.is_set():
                stream.cancel()
        try:
            for response in stream:
                self._handle(response)
        except grpc.RpcError as error:
            # The error is the stream itself: its traceback would tie this frame, and with it the mappings, into a cycle
            # that only a garbage collection ends. Engines freeze or disable that.
            error.__traceback__ = None
            return from_rpc_error(error, self._connection.target)
        except CacheError as error:
            reason = self._reason_of_end(stream) if isinstance(error, NotFoundError) else None
            stream.cancel()
            return reason or error
        finally:
            self._held = False
        return daemon_unavailable(self._connection.target, "it ended the lease")

    def _reason_of_end(self, stream: grpc.Call) -> CacheError | None:
        """Why the daemon ended a lease that its descriptor socket did not know any more: it says so on the stream."""
        ended = threading.Event()
        if stream.add_callback(ended.set) and not ended.wait(_REASON_TIMEOUT_S):
            return None
        return None if stream.code() is grpc.StatusCode.OK else from_rpc_error(stream, self._connection.target)

    def _give_up(self, error: CacheError) -> None:
        if self._arrivals.report is None:
            self._arrivals.failed(error)
            return
        lost = LeaseLostError(
            f"the daemon was restarted and does not hold {self._ref()} any more: {error.message}",
            hint="the model goes on from its mappings; attach again for a lease, and memory, that the daemon knows of",
            ref=self._ref(),
        )
        lost.__cause__ = error
        _log.warning("the lease is lost: %s", lost)
        self.lost = lost

    def _next_delay_s(self) -> float:
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, _LONGEST_DELAY_S)
        # Workers of one host must not all come back at one instant.
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 no secret

    def _same_request(self) -> pb.AttachRequest:
        request = pb.AttachRequest()
        request.CopyFrom(self._request)
        request.ref = self._ref()
        return request

    def _request_again(self) -> pb.AttachRequest:
        request = self._same_request()
        request.resume = self._arrivals.report is not None
        if request.resume:
            request.ClearField("selection")
        if request.resume and self.selected is not None:
            for index, offset_bytes, length_bytes in self.selected.ranges():
                request.selection.held.add(file_index=index, offset_bytes=offset_bytes, length_bytes=length_bytes)
        return request

    def _ref(self) -> str:
        opened = self.opened
        return f"{opened.name}@{opened.revision}" if opened is not None and opened.revision else self._request.ref

    def _handle(self, response: pb.AttachResponse) -> None:
        event = response.WhichOneof("event")
        if event == "opened":
            self._handle_opened(response.opened)
        elif event == "ranges_ready":
            ranges = response.ranges_ready.ranges
            self._arrivals.announced([(item.file_index, item.offset_bytes, item.length_bytes) for item in ranges])
        elif event == "complete":
            self._handle_complete(response.complete)
        elif event == "damaged":
            self._handle_damaged(response.damaged)

    def _handle_opened(self, opened: pb.Opened) -> None:
        if self._arrivals.report is None:
            files = _files_of(opened)
            before = self._arrivals.infos()
            if before and [(file.path, file.size_bytes) for file in before] != [(f.path, f.size_bytes) for f in files]:
                raise IntegrityError(
                    f"the files of {self._ref()} are not what they were before the daemon was restarted",
                    hint="attach again",
                )
            if opened.HasField("selected"):
                self.selected = Selected(opened.selected, [file.size_bytes for file in files])
            mapped = self._map(opened)
            self._take_up(opened)
            self._delay_s = _FIRST_DELAY_S
            self._arrivals.opened(files, mapped)
        else:
            self._take_up(opened)
        if opened.HasField("complete"):
            self._handle_complete(opened.complete)

    def _take_up(self, opened: pb.Opened) -> None:
        self.opened = opened
        self._held = True

    def _handle_complete(self, complete: pb.Complete) -> None:
        self._delay_s = _FIRST_DELAY_S  # of a lease that is taken up not before: its content may fail to be confirmed
        if self._arrivals.report is None:
            only = None if self.selected is None else self.selected.ranges()
            self._arrivals.completed(load_report(complete), only)

    def _handle_damaged(self, message: pb.Damaged) -> None:
        damage = self._arrivals.damaged(message.file_index, message.offset_bytes, message.length_bytes)
        _log.error("%s of %s is damaged in memory at %d", damage.path, self._ref(), damage.offset_bytes)
        if self._on_damaged is None:
            return
        with self._lock:
            if self._stopping.is_set():
                return
            self._in_callback = True
        try:
            self._on_damaged(damage)
        except Exception:  # noqa: BLE001 the callback is the worker's own; its failure must not cost the lease
            _log.exception("on_damaged raised")
        finally:
            self._in_callback = False

    def _map(self, opened: pb.Opened) -> list[MappedFile]:
        """The mappings of the opened files by index; a file whose segment is still the same keeps the one it has."""
        before, paths = self._arrivals.mapped(), [info.path for info in self._arrivals.infos()]
        mapped = [MappedFile.empty() for _ in opened.files]
        for index, new in self._fetch(opened):
            same = before and before[index].identity == new.identity
            mapped[index] = before[index] if same else new
            old = before[index].range if before and not same else None
            if old is not None:
                self._replaced.append((paths[index], weakref.ref(old)))
        return mapped

    def _fetch(self, opened: pb.Opened) -> Iterator[tuple[int, MappedFile]]:
        chosen = None if self.selected is None else self.selected.indices
        sizes_bytes = {
            file.index: file.size_bytes
            for file in opened.files
            if file.size_bytes and (chosen is None or file.index in chosen)
        }
        if not sizes_bytes:
            return
        path = locate(opened.descriptor_socket, self._connection.path)
        with DescriptorClient(path, self._stopping) as client:
            self._fetching = client
            if self._stopping.is_set():  # before `cancel` could see it
                client.interrupt()
            try:
                for index, descriptor in client.fetch(opened.token, list(sizes_bytes)):
                    yield index, MappedFile(descriptor, sizes_bytes[index])
            finally:
                self._fetching = None


def _files_of(opened: pb.Opened) -> list[FileInfo]:
    files = sorted(opened.files, key=lambda file: file.index)
    if [file.index for file in files] != list(range(len(files))):
        raise CacheError("the daemon numbers the files of the model with gaps")
    return [FileInfo(file.path, file.size_bytes, file.sha256) for file in files]
