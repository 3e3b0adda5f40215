"""The cache as a worker sees it: attach models, pull them, list them."""

from __future__ import annotations

import os
import re
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from cached_client._proto import cached_pb2 as pb
from cached_client._selected import patterns
from cached_client._suspend import disconnect
from cached_client.attach import Model, attach
from cached_client.connection import Connection
from cached_client.errors import CacheError, InvalidRequestError
from cached_client.types import DamagedRange, ModelSummary, PullProgress, model_summary, pull_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

_ARTIFACT = re.compile(r"artifact\.[0-9a-f]{64}")
_TIERS = ("hot", "warm", "cold", "auto")
_LEVELS = ("l1", "l2")


def connect(target: str | os.PathLike[str] | None = None) -> Cache:
    """The cache of this host. ``target`` is the daemon's socket, as a path or ``unix:///path``.

    Without one: ``CACHED_SOCKET``, else ``/run/cached/cached.sock``, else that of this user's own daemon. Nothing is
    sent yet, so this does not fail when the daemon is not there; `Cache.wait_ready` waits for it. Raises
    InvalidRequestError for what cannot be a socket.
    """
    return Cache(Connection(target))


class Cache:
    """A connection to the host's daemon. Any thread may use it; it belongs to the process that made it.

    Every method raises `CacheError`: DaemonUnavailableError when nobody answers, NotReadyError while it starts or
    stops. A REF is ``NAME``, ``NAME@REVISION`` or a URI.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.RLock()  # a garbage collection within it may run code of the caller's, which may use it
        self._models: weakref.WeakSet[Model] = weakref.WeakSet()
        self._attaching = 0
        self._closings = 0

    def attach(
        self,
        ref: str,
        *,
        source: str = "",
        timeout_s: float | None = None,
        wait: bool = False,
        client_name: str | None = None,
        only_if_resident: bool = False,
        keep_alive_s: float = 0.0,
        on_damaged: Callable[[DamagedRange], None] | None = None,
        only: Iterable[str] | None = None,
        first: Iterable[str] | None = None,
        files: Iterable[str] = (),
    ) -> Model:
        """Takes a lease on a model, which is pulled or promoted if it is not in memory, and maps it.

        Returns as soon as its files are known and mapped, while they are still arriving; with ``wait`` once it is
        complete. Both within ``timeout_s``, else TimeoutExpiredError is raised and the lease given back; the pull goes
        on.

        ``source`` is the origin's URI for a model that is not in the catalog. ``client_name`` is what `cached ps` shows
        (by default this program's name). ``only_if_resident``: NotFoundError instead of a load. ``keep_alive_s``:
        once the lease has ended, however it did, the model stays in memory before others for so long (a day at most,
        else InvalidRequestError), for a replica that comes back. ``on_damaged`` is called in the lease's thread when
        bytes of the model are found damaged in memory.

        ``only`` fetches and maps only the tensors whose names one of these patterns matches (as a shell does it:
        ``model.layers.0.*``), in whole chunks of 16 MiB; ``names``, ``state_dict``, ``stream`` and ``load_into`` then
        give those, and anything else raises NotFoundError. ``first`` fetches them before everything else of the model.
        ``files`` are patterns of paths of files that belong to the selection whole (``config.json``, ``tokenizer*``);
        without them ``only`` fetches none. NotFoundError for a pattern that matches nothing, FormatError
        for weight files that cannot be read. InvalidRequestError for both ``only`` and ``first``.
        """
        request = pb.AttachRequest(
            ref=ref,
            source=source,
            client_name=_program_name() if client_name is None else client_name,
            client_pid=os.getpid(),
            only_if_resident=only_if_resident,
            keep_alive_s=keep_alive_s,
            selection=_selection(only, first, files),
        )
        with self._lock:
            self._attaching += 1
            closings = self._closings
        try:
            model = attach(self.connection, request, timeout_s=timeout_s, wait=wait, on_damaged=on_damaged)
        except BaseException as error:
            if self._ended(closings) and isinstance(error, CacheError):
                raise _closed_meanwhile(ref) from error
            raise
        if self._ended(closings, model):
            raise _closed_meanwhile(ref)
        return model

    def pull(
        self,
        ref: str,
        *,
        source: str = "",
        tier: str = "",
        level: str = "l1",
        wait: bool = True,
        at_time_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> Iterator[PullProgress]:
        """Brings a model into the cache without taking a lease; yields its progress.

        The last has the phase ``ready``, or without ``wait`` the phase ``accepted``. With ``at_time_s``, a Unix time,
        the only one has the phase ``scheduled``: the daemon begins the pull then, also after a restart. Infinity takes
        back what was scheduled.

        Nothing happens before the first step of the iteration. Leaving it does not end the pull, nor does
        ``timeout_s``. ``tier`` sets how soon the model is wanted (``hot``, ``warm``, ``cold``, ``auto``), ``level``
        where to bring it (``l1`` memory, ``l2`` disk).
        """
        request = pb.PullRequest(
            ref=ref,
            source=source,
            tier=_chosen("tier", tier, _TIERS) if tier else None,
            level=_chosen("level", level, _LEVELS),
            no_wait=not wait,
            at_time_s=at_time_s,
        )
        for response in self.connection.stream(self.connection.stub.Pull, request, timeout_s=timeout_s):
            yield pull_progress(response.progress)

    def list(self) -> list[ModelSummary]:
        """All models that the daemon knows. Compile artifacts are none, though they are kept as models are."""
        response = self.connection.call(self.connection.stub.List, pb.ListRequest())
        return [model_summary(message) for message in response.models if not _ARTIFACT.fullmatch(message.name)]

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until the daemon answers. Raises DaemonUnavailableError or NotReadyError after ``timeout_s``."""
        self.connection.wait_ready(timeout_s)

    def suspend(self, *, discard_changes: bool = False, timeout_s: float | None = None) -> None:
        """Suspends every model that was attached here (see `Model.suspend`), and ends the connection.

        When it returns, nothing of this cache is left in the process but ranges of addresses: no mapping, descriptor,
        thread or channel. Each model is looked at before the first is suspended; if one cannot be (it has not arrived
        in time, or was written to), that error is raised and all stay as they are. What another thread attaches
        meanwhile is not suspended.
        """
        models = [model for model in self._attached() if not model.closed]
        for model in models:
            model.check_suspendable(discard_changes=discard_changes, timeout_s=timeout_s)
        for model in models:
            model.suspend(discard_changes=discard_changes, timeout_s=timeout_s)
        disconnect(self.connection)

    def resume(self, timeout_s: float | None = None) -> None:
        """Resumes every suspended model (see `Model.resume`), for ``timeout_s`` each.

        One that fails does not keep the others from coming back; the first error is raised at the end.
        """
        failed: CacheError | None = None
        for model in self._attached():
            try:
                model.resume(timeout_s)
            except CacheError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Closes the models that were attached here, and then the connection. Idempotent.

        An attach that another thread has begun by the end of this raises CacheError (``CLOSED``), and leaves no lease;
        one that begins later opens the connection again.
        """
        with self._lock:
            self._closings += 1
        for model in self._attached():
            model.close()
        with self._lock:
            self._closings += 1  # also of an attach that was begun meanwhile
            self.connection.close()

    def _attached(self) -> Sequence[Model]:
        with self._lock:
            return [*self._models]

    def _ended(self, closings: int, model: Model | None = None) -> bool:
        """An attach has ended, with a model or not: whether `close` was called meanwhile. The model is kept, or closed.

        The lease may have opened the connection again, or does as it is given back: whoever is the last closes it.
        """
        with self._lock:
            closed = self._closings != closings
            if model is not None and not closed:
                self._models.add(model)
        try:
            if model is not None and closed:
                model.close()
        finally:
            with self._lock:
                self._attaching -= 1
                if closed and not self._attaching and all(other.closed for other in self._models):
                    self.connection.close()
        return closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closed_meanwhile(ref: str) -> CacheError:
    return CacheError(
        f"the cache was closed while {ref} was attached",
        hint="close it once no thread attaches any more",
        reason="CLOSED",
        ref=ref,
    )


def _program_name() -> str:
    return os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"


def _selection(only: Iterable[str] | None, first: Iterable[str] | None, files: Iterable[str]) -> pb.Selection | None:
    paths = patterns("files", files)
    if only is None and first is None:
        if paths:
            raise InvalidRequestError("files were selected, but neither only nor first", hint="give only=[] with files")
        return None
    if only is not None and first is not None:
        raise InvalidRequestError(
            "only and first exclude each other", hint="first brings the rest after it, only does not"
        )
    tensors = patterns("only", only) if only is not None else patterns("first", first or ())
    if not tensors and not paths:
        raise InvalidRequestError("nothing was selected", hint="give patterns of tensor names, or of files")
    return pb.Selection(tensors=tensors, files=paths, rest_follows=first is not None)


def _chosen(what: str, word: str, words: tuple[str, ...]) -> str:
    """The name on the wire: ``TIER_HOT`` for ``hot``."""
    if word not in words:
        raise InvalidRequestError(f"{word!r} is not a {what}", hint=f"use {', '.join(words)}", value=word)
    return f"{what}_{word}".upper()
