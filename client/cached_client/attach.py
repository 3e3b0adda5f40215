"""An attached model: its files and tensors, without a copy, while they arrive and for as long as they are used."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from cached_client._arrivals import Arrivals, Deadline
from cached_client._index import TensorIndex
from cached_client._lease import Lease
from cached_client._proto import cached_pb2 as pb
from cached_client._selected import left_out, tensor_names
from cached_client._suspendable import Suspendable
from cached_client._tensors import all_tensors, tensors
from cached_client.errors import CacheError, LeaseLostError, NotFoundError
from cached_client.gpu import GpuOptions, to_device
from cached_client.gpu.image import slice_of
from cached_client.gpu.load import DeviceLoads, parse_device
from cached_client.gpu.upload import Wanted
from cached_client.types import DamagedRange, FileInfo, LoadReport

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    import numpy.typing as npt
    import torch

    from cached_client.connection import Connection
    from cached_client.gpu import DeviceReport
    from cached_client.gpu.image import Slices
    from cached_client.module import Rename
    from cached_client.safetensors_header import TensorInfo

_DESCRIBE_TIMEOUT_S = 5.0


class Model(Suspendable):
    """A model in the host's shared memory, held by a lease. Made by `Cache.attach`.

    It can be used as soon as it exists. Whatever reads bytes waits until the daemon has verified those bytes, for at
    most ``timeout_s`` (None: as long as the load takes), and then raises TimeoutExpiredError; if the load fails,
    whoever waits or reads gets its error. Every chunk is verified before it is announced, but the check of whole files
    comes last: what is read before `complete` has passed its own chunk's check and not yet that one. `stream`,
    `state_dict` and `load_into` therefore end normally only once the model is complete, and raise IntegrityError if
    that check fails.

    Tensors, arrays and views are windows on shared memory, mapped copy-on-write: a write is seen by this process alone,
    in everything that it reads from the same bytes. They stay valid for as long as they are referred to, also after
    `close`; but the lease ends with `close`, and then the daemon may evict the model, and counts its memory as not yet
    free.

    Any thread may use it. It belongs to the process that attached it: in a child process attach again, it costs
    nothing. A restart of the daemon is not noticed, except as a pause if the model was still arriving.
    """

    def __init__(
        self,
        connection: Connection,
        lease: Lease,
        arrivals: Arrivals,
        on_damaged: Callable[[DamagedRange], None] | None = None,
    ) -> None:
        """For `Cache.attach`: the attach is open."""
        opened = lease.opened
        if opened is None:
            msg = "the attach is not open"
            raise ValueError(msg)
        self.name: str = opened.name
        self.revision: str = opened.revision
        self._connection = connection
        self._on_damaged = on_damaged
        self._changing = threading.RLock()  # held while it is suspended, resumed or closed
        self._suspended = None
        self._coming = None
        self._closed = False
        self._loads_finalizer: weakref.finalize[..., Model] | None = None
        self._take(lease, arrivals)

    def _take(self, lease: Lease, arrivals: Arrivals) -> None:
        """From now on the model is held by this lease."""
        self._lease = lease
        self._arrivals = arrivals
        self._selected = lease.selected
        self._index = TensorIndex(arrivals, lease.selected)
        self._file_indices = {info.path: index for index, info in enumerate(arrivals.infos())}
        self._described = pb.DescribeResponse()
        self._device_loads = DeviceLoads(arrivals, self._index, lease.descriptors, may_register=lease.selected is None)
        if self._loads_finalizer is not None:
            self._loads_finalizer.detach()  # of the lease before: it would keep all that this had until the model ends
        self._loads_finalizer = weakref.finalize(self, self._device_loads.close)
        # A model that is dropped without close() must not hold its lease until the process ends.
        self._finalizer = weakref.finalize(self, lease.cancel)

    def __repr__(self) -> str:
        return f"<Model {self.name}@{self.revision[:12]} {self._state()}>"

    # State.

    def _state(self) -> str:
        if self._closed:
            return "closed"
        if self.suspended:
            return "suspended"
        return "complete" if self.complete else "arriving"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def failed(self) -> bool:
        """Whether its load failed: whoever reads gets that error."""
        return not (self._closed or self.suspended) and self._arrivals.is_failed

    @property
    def complete(self) -> bool:
        """Whether all of it, or of the selection, is in memory and its strongest check has passed."""
        return self._arrivals.report is not None

    @property
    def partial(self) -> bool:
        """Whether only a selection was attached (``only=``): what it left out is not there, whatever this host has."""
        return self._selected is not None

    @property
    def report(self) -> LoadReport | None:
        """How it came into memory; None until it is complete."""
        return self._arrivals.report

    @property
    def timings(self) -> dict[str, float]:
        """Seconds from the start of the attach to each of its moments, as far as they have come.

        ``opened``: the daemon answered, and the files are mapped. ``first_range``: the first bytes could be read
        (absent if everything was there at once), ``last_range``: the last of them until now. ``complete``. Of the first
        load to a device: ``device_first`` (the first tensor is there) and ``device_complete``; see also
        `device_report`.
        """
        return self._arrivals.timings

    @property
    def attach_started_s(self) -> float:
        """When the attach began, in seconds of ``time.monotonic()``: what `timings` count from."""
        return self._arrivals.started_s

    @property
    def device_report(self) -> DeviceReport | None:
        """How the last load to a device went: its path, what it did without, bytes and seconds. None: none yet."""
        return self._device_loads.report

    @property
    def damaged(self) -> tuple[DamagedRange, ...]:
        """What was found damaged in memory since. Reading those bytes raises IntegrityError; a new attach mends it."""
        return self._arrivals.damage

    @property
    def lease_lost(self) -> LeaseLostError | None:
        """That the lease is lost, if it is: the daemon was restarted and does not have the content any more.

        Its ``__cause__`` is what the daemon said. The model goes on working from its mappings; only the daemon does not
        know of it.
        """
        return self._lease.lost

    def wait(self, timeout_s: float | None = None) -> LoadReport:
        """Waits until the model is complete. Raises the load's error, or TimeoutExpiredError."""
        return self._wait_complete(Deadline(timeout_s))

    # Files.

    @property
    def files(self) -> Mapping[str, FileInfo]:
        """The files by path: size, SHA-256, and where the directory view shows them (see `directory`).

        Of a selection those that are selected whole.
        """
        selected = self._selected
        infos = {
            info.path: info
            for index, info in enumerate(self._arrivals.infos())
            if selected is None or index in selected.files
        }
        described = self._describe()
        directory = _visible(described.path)
        for file in described.files:
            if file.path in infos:
                path = directory / file.path if directory else None
                local_path = path if path and os.path.isfile(path) else None  # Path.is_file raises PermissionError
                infos[file.path] = replace(infos[file.path], sha256=file.sha256, local_path=local_path)
        return MappingProxyType(infos)

    @property
    def directory(self) -> Path | None:
        """The model as an ordinary directory of links, for code that wants files. It stays for as long as the lease.

        None until the model is complete, while the daemon does not answer, where this process does not see the
        directory (a container without the mount), and for a selection.
        """
        return _visible(self._describe().path)

    def view(self, path: str, timeout_s: float | None = None) -> memoryview:
        """All bytes of a file, zero-copy and read-only. Raises NotFoundError for a path that is unknown or left out."""
        index = self._file_indices.get(path)
        if index is None:
            raise NotFoundError(f"the model has no file {path!r}", hint="files lists its files", path=path)
        if self._selected is not None and index not in self._selected.files:
            raise left_out("file", path)
        size_bytes = self._arrivals.infos()[index].size_bytes
        return self._wait_view(index, 0, size_bytes, Deadline(timeout_s), path).toreadonly()

    def read(self, path: str, timeout_s: float | None = None) -> bytes:
        """A copy of a file's bytes; meant for configuration and tokenizer files, which arrive first."""
        return bytes(self.view(path, timeout_s))

    def open(self, path: str, timeout_s: float | None = None) -> BinaryIO:
        """A file object over a copy of a file's bytes; meant for small files, as `read` is."""
        return io.BytesIO(self.read(path, timeout_s))

    # Tensors.

    def names(self, timeout_s: float | None = None) -> list[str]:
        """All tensor names, in the order of files and bytes. Waits for the headers of all weight files.

        Of a selection (``only=``) the names that it matches; nothing is waited for then.

        Raises FormatError if a header is not valid, or if two weight files hold a tensor of the same name.
        """
        return self._index.names(Deadline(timeout_s))

    def info(self, name: str, timeout_s: float | None = None) -> TensorInfo:
        """Dtype, shape and place of a tensor, from its file's header. Waits only for headers. Raises NotFoundError."""
        return self._index.find(name, Deadline(timeout_s))[1]

    def raw(self, name: str, timeout_s: float | None = None) -> memoryview:
        """A tensor's bytes as they are in the file, zero-copy, for any dtype. Raises NotFoundError."""
        deadline = Deadline(timeout_s)
        index, info = self._index.find(name, deadline)
        return self._wait_view(index, info.begin, info.end, deadline, name)

    def tensor(self, name: str, timeout_s: float | None = None) -> torch.Tensor:
        """A tensor on the CPU, zero-copy, of the dtype and shape that ``safetensors.torch`` gives.

        Waits until its bytes have arrived. Raises NotFoundError, FormatError, or UnsupportedDtypeError where torch has
        no such type (see `raw`).
        """
        from cached_client.torch import tensor_from_view

        return tensor_from_view(self.raw(name, timeout_s), self.info(name))

    def numpy(self, name: str, timeout_s: float | None = None) -> npt.NDArray[Any]:
        """A tensor as an array, zero-copy. Raises as `tensor` does; BF16 and F8 need the package ``ml_dtypes``."""
        from cached_client.numpy import array_from_view

        return array_from_view(self.raw(name, timeout_s), self.info(name))

    def stream(
        self,
        device: str | torch.device | None = None,
        names: Iterable[str] | None = None,
        timeout_s: float | None = None,
        *,
        slices: Slices | None = None,
        gpu: GpuOptions | None = None,
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yields ``(name, tensor)`` in the order of arrival, each as soon as all its bytes are there.

        What arrived together comes in the order of files and bytes: files by path, as the model's index names them. The
        daemon fetches in about that order, too.

        Without ``device`` the tensors are views in shared memory; with one they are copied there: to a GPU through a
        ring of pinned memory, in the background, so that it goes on while the caller works on what it got (``gpu``
        tunes that, `device_report` tells how it went). ``names`` chooses some of them (NotFoundError at the end for
        those that do not exist, InvalidRequestError for a bare text). ``timeout_s`` is for the whole. It ends normally
        only once the model is complete: what was yielded before may be used in computation, but not be answered with.

        ``slices`` gives a rank's part of tensors: ``{name: (dim, start, stop)}``, or a function from `TensorInfo` to
        that or None; what is not named comes whole. Only a part's bytes cross to the device, where it is contiguous; on
        the CPU it is a view. InvalidRequestError for one that does not fit; what the function raises comes as it is.

        Raises DeviceError if the device cannot be used, has no room, or fails. A tensor on a GPU is ready for use on
        any stream. It is part of a flat buffer with its neighbours (of ``gpu.buffer_bytes``), and their memory is freed
        together. Close the iterator, or use it up: until then the copy's threads stay.
        """
        options = gpu or GpuOptions()
        chosen = None if names is None else tensor_names(names)
        wanted = Wanted(chosen, slices, options.buffer_bytes, options.ahead_bytes)
        yield from self._tensors(device, wanted, options, Deadline(timeout_s))

    def state_dict(
        self,
        device: str | torch.device | None = None,
        timeout_s: float | None = None,
        *,
        slices: Slices | None = None,
        gpu: GpuOptions | None = None,
    ) -> dict[str, torch.Tensor]:
        """All tensors by name, in the order of `names`: on the CPU zero-copy, or copied to ``device`` as they arrive.

        On a GPU the tensors of a file are views of one flat buffer, which is freed with the last of them. Waits until
        the model is complete. ``slices``, ``gpu`` and errors are those of `stream`.
        """
        arrived = self._all(device, Wanted(slices=slices), gpu or GpuOptions(), Deadline(timeout_s))
        names = self.names()
        return arrived if list(arrived) == names else {name: arrived[name] for name in names}

    def load_into(
        self,
        module: torch.nn.Module,
        device: str | torch.device | None = None,
        *,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        timeout_s: float | None = None,
        slices: Slices | None = None,
        gpu: GpuOptions | None = None,
    ) -> Any:
        """Loads a ``torch.nn.Module``; returns torch's ``(missing_keys, unexpected_keys)``.

        If any of the module is on the meta device the tensors become its parameters: on ``device``, in ``dtype``
        (floating-point ones; None: as in the model), and for the CPU in the model's own dtype without a copy. Otherwise
        their values are copied into the parameters that it has, where they are and in their dtype.

        ``rename`` tells a tensor's name in the module, as a mapping or a function; None from it leaves the tensor out.
        Parameters that are tied (one object in the module) need one of their names in the model, and stay tied. With
        ``strict``, torch's RuntimeError is raised if names or shapes differ, and InvalidRequestError if the module has
        buffers on the meta device that no checkpoint holds (non-persistent ones). ``slices`` and ``gpu`` are those of
        `stream`.
        """
        from cached_client.module import check_loadable, fill, new_names

        if strict:
            check_loadable(module)
        deadline = Deadline(timeout_s)
        if rename is None:
            tensors = self.state_dict(device, timeout_s, slices=slices, gpu=gpu)
        else:
            names = new_names(self.names(timeout_s), rename)
            wanted = Wanted(frozenset(names), slices)
            arrived = self._all(device, wanted, gpu or GpuOptions(), deadline)
            tensors = {new: arrived[name] for name, new in names.items()}
        return fill(module, tensors, strict=strict, dtype=dtype)

    # End.

    def close(self) -> None:
        """Ends the lease: when this returns, the daemon was told. Idempotent.

        Tensors that were handed out stay valid, unless the model is suspended. Whoever waits for it, in any thread,
        hears of it at once.
        """
        self._closed = True
        for arrivals in filter(None, (self._arrivals, self._coming)):
            arrivals.end()  # a thread that suspends or resumes the model may be waiting within the lock
        with self._changing:
            self._suspended = None
            if self._finalizer.detach() is not None:
                self._device_loads.close()
                self._lease.stop()
            self._arrivals.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _describe(self) -> pb.DescribeResponse:
        """What the daemon knows of the complete model; asked until it knows all, for some digests come late."""
        if self.complete and not self.partial and not self._described.path:
            request = pb.DescribeRequest(ref=f"{self.name}@{self.revision}" if self.revision else self.name)
            try:
                described = self._connection.call(
                    self._connection.stub.Describe, request, timeout_s=_DESCRIBE_TIMEOUT_S
                )
            except CacheError:
                return self._described  # only a convenience: a model works without its daemon
            if not all(file.sha256 for file in described.files):
                return described
            self._described = described
        return self._described

    def _wait_complete(self, deadline: Deadline) -> LoadReport:
        return self._arrivals.wait_for(lambda: self._arrivals.report, deadline, f"the model {self.name}")

    def _wait_view(self, index: int, begin: int, end: int, deadline: Deadline, what: str) -> memoryview:
        return self._arrivals.wait_for(lambda: self._arrivals.view(index, begin, end), deadline, what)

    def _tensors(
        self, device: str | torch.device | None, wanted: Wanted, options: GpuOptions, deadline: Deadline
    ) -> Iterator[tuple[str, torch.Tensor]]:
        target = parse_device(device)
        if target is None:
            yield from self._views(None, wanted, deadline)
        else:
            yield from self._device_loads.tensors(
                target, wanted, options, deadline, lambda: self._views(target, wanted, deadline)
            )
        sliced = wanted.slices if isinstance(wanted.slices, Mapping) else ()
        for name in sorted({*(wanted.names or ()), *sliced}):
            self._index.find(name, deadline)
        self._wait_complete(deadline)

    def _all(
        self, device: str | torch.device | None, wanted: Wanted, options: GpuOptions, deadline: Deadline
    ) -> dict[str, torch.Tensor]:
        """`_tensors` of a model that is complete by then.

        Those on the CPU are windows on its bytes: if any were taken back meanwhile, all are made again, or raise.
        """
        on_cpu = parse_device(device) is None
        while True:
            revocations = self._arrivals.revocations
            if on_cpu and wanted.names is None and wanted.slices is None:
                arrived = all_tensors(self._arrivals, self._index, deadline, f"the tensors of {self.name}")
                self._wait_complete(deadline)
            else:
                arrived = dict(self._tensors(device, wanted, options, deadline))
            if not on_cpu or self._arrivals.revocations == revocations:
                return arrived

    def _views(
        self, device: torch.device | None, wanted: Wanted, deadline: Deadline
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as views, or each copied to ``device`` by itself."""
        what = f"the tensors of {self.name}"
        for info, tensor in tensors(self._arrivals, self._index, wanted.names, deadline, what):
            part = slice_of(info, wanted.slices)
            chosen = tensor if part is None else tensor.narrow(part[0], part[1], part[2] - part[1])
            yield info.name, to_device(chosen, device)


def attach(
    connection: Connection,
    request: pb.AttachRequest,
    *,
    timeout_s: float | None = None,
    wait: bool = False,
    on_damaged: Callable[[DamagedRange], None] | None = None,
) -> Model:
    """What `Cache.attach` does: takes a lease and maps the model's files. If it raises, no lease is held."""
    deadline = Deadline(timeout_s)
    arrivals = Arrivals()
    lease = Lease(connection, request, arrivals, on_damaged)
    lease.start()
    try:
        arrivals.wait_for(arrivals.is_open, deadline, f"the attach of {request.ref}")
        if wait:
            arrivals.wait_for(lambda: arrivals.report, deadline, f"the model {request.ref}")
        return Model(connection, lease, arrivals, on_damaged)
    except BaseException:
        lease.stop()
        raise


def _visible(directory: str) -> Path | None:
    """The directory of this revision, if the process sees it: the link by the model's name moves on to later ones."""
    return Path(directory).resolve() if directory and os.path.isdir(directory) else None
