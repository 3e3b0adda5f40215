"""What `Model` can do around a snapshot of its process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached_client._arrivals import Arrivals, Deadline
from cached_client._suspend import bring_back, check_unchanged, prepare, set_aside
from cached_client.errors import InUseError, SuspendedError

if TYPE_CHECKING:
    import threading
    import weakref
    from collections.abc import Callable

    from cached_client._index import TensorIndex
    from cached_client._lease import Lease
    from cached_client._suspend import Suspended
    from cached_client.connection import Connection
    from cached_client.gpu.load import DeviceLoads
    from cached_client.types import DamagedRange, LoadReport


class Suspendable:
    """The part of `Model` that is its suspension: the state is the model's own, all of it."""

    name: str
    revision: str
    _changing: threading.RLock
    _closed: bool
    _suspended: Suspended | None
    _coming: Arrivals | None  # while it is resumed, so that `close` need not wait for that
    _connection: Connection
    _lease: Lease
    _arrivals: Arrivals
    _index: TensorIndex
    _device_loads: DeviceLoads
    _finalizer: weakref.finalize[..., Suspendable]
    _on_damaged: Callable[[DamagedRange], None] | None

    def _take(self, lease: Lease, arrivals: Arrivals) -> None:
        raise NotImplementedError

    def _wait_complete(self, deadline: Deadline) -> LoadReport:
        raise NotImplementedError

    @property
    def suspended(self) -> bool:
        """Whether `suspend` was called, and not `resume` yet."""
        return self._suspended is not None

    def check_suspendable(self, *, discard_changes: bool = False, timeout_s: float | None = None) -> None:
        """Raises what `suspend` would raise, and changes nothing."""
        with self._changing:
            if self._suspended is None:
                self._prepare_suspension(discard_changes, Deadline(timeout_s))

    def suspend(self, *, discard_changes: bool = False, timeout_s: float | None = None) -> None:
        """Gives back the lease and the memory, and keeps the addresses, until `resume`; for a snapshot of the process.

        Waits until the model is complete, and its digests are known. When this returns, this process has no mapping,
        descriptor, thread or call of the model; `Cache.suspend` ends the channel, too. The daemon may evict it.

        **Tensors, arrays and views that were handed out must not be touched meanwhile**, by any thread: their addresses
        hold no memory, and a read ends the process with SIGSEGV, rather than answer with what is not the weights. What
        is asked of the model itself raises SuspendedError. Copies on a device are not concerned.

        A write to a tensor is private to this process and would be lost: then ChangedError is raised, and nothing is
        suspended, unless ``discard_changes`` is given. InUseError while a copy to a device is under way. Idempotent.
        """
        with self._changing:
            if self._suspended is not None:
                return
            suspended = self._prepare_suspension(discard_changes, Deadline(timeout_s))
            ref = f"{self.name}@{self.revision[:12]}"
            self._arrivals.failed(SuspendedError(f"{ref} is suspended", hint="call resume() first", ref=ref))
            self._finalizer.detach()
            self._device_loads.close()
            self._lease.stop()
            set_aside(suspended)
            self._suspended = suspended

    def resume(self, timeout_s: float | None = None) -> None:
        """Takes a lease on the same content again, and maps it at the same addresses: tensors are what they were.

        The model is brought back into memory if it was evicted. Its revision is asked for, and the sizes and SHA-256 of
        its files are compared with what they were.
        Raises IntegrityError if the content is another, NotFoundError if that revision is not to be had any more, and
        whatever `Cache.attach` does; then the model stays suspended, and `resume` may be called again. Idempotent.
        """
        with self._changing:
            if self._suspended is None:
                return
            suspended, deadline = self._suspended, Deadline(timeout_s)
            self._coming = arrivals = Arrivals()
            if self._closed:
                arrivals.end()
            try:
                lease = bring_back(self._connection, suspended, arrivals, self._on_damaged, deadline)
            finally:
                self._coming = None
            self._suspended = None
            self._take(lease, arrivals)

    def _prepare_suspension(self, discard_changes: bool, deadline: Deadline) -> Suspended:  # noqa: FBT001 our own
        self._wait_complete(deadline)
        if self._device_loads.busy:
            raise InUseError(
                f"a copy of {self.name} to a device is under way",
                hint="use up or close the iterator of stream() first",
                ref=self.name,
            )
        suspended = prepare(self._connection, self._lease, self._arrivals, deadline)
        if not discard_changes:
            check_unchanged(suspended, self._index, deadline)
        return suspended
