"""The models of this process: each attached once, and shared by all of its threads."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cached_client._arrivals import Deadline
from cached_client.cache import Cache, connect
from cached_client.connection import default_target, socket_path
from cached_client.errors import InvalidRequestError, SuspendedError, TimeoutExpiredError

if TYPE_CHECKING:
    from cached_client.attach import Model

_REGISTRIES: dict[int, _Registry] = {}
"""By process: a child of a fork begins anew. It keeps its parent's registry, unused: what gRPC has in there is not to
be ended in a child."""


def load(
    ref: str, *, target: str | os.PathLike[str] | None = None, timeout_s: float | None = None, **options: Any
) -> Model:
    """The model, attached to this process with the first call, and the same one for every thread with each later call.

    For a handler that is called again and again, a notebook's cell, a pool of threads. Of many callers at once one
    attaches, and the others wait for it. ``options`` are those of `Cache.attach` (``source``, ``wait``,
    ``client_name``, …); a later call may leave them away, or must give the same (InvalidRequestError), except for
    ``wait``. ``timeout_s`` is each call's own. ``target`` is that of `connect`.

    The lease is held until `unload`, or the end of the process; nothing counts the callers. So a ``with`` block around
    the answer, or its ``close``, ends it for all, and the next call attaches again. That is also what happens if the
    load failed, if bytes of it were found damaged, or if the lease is lost; tensors that were handed out stay valid.
    Then the options that were given last count on where none are given, and others may be given. A newer revision of
    the model is not looked for until `unload`, which forgets the options too.

    ``NAME`` and ``NAME@REVISION`` give one and the same model where they mean the same. A child process attaches anew.
    Raises what `Cache.attach` does; SuspendedError between `suspend` and `resume`.
    """
    return _registry().load(ref, target, timeout_s, options)


def shared_cache(target: str | os.PathLike[str] | None = None) -> Cache:
    """The one connection of this process that `load` uses, too; `unload` does not end it."""
    return _registry().cache(_path(target))


def unload(ref: str | None = None, *, target: str | os.PathLike[str] | None = None) -> None:
    """Closes what `load` attached: the model of this reference, or without one all of them. Idempotent.

    Tensors stay valid. At the end of the process leases end by themselves.
    """
    _registry().unload(None if ref is None else (_path(target), ref))


def suspend(*, discard_changes: bool = False, timeout_s: float | None = None) -> None:
    """Suspends all that this process attached through `load` and the integrations: see `Cache.suspend`."""
    for cache in _registry().caches():
        cache.suspend(discard_changes=discard_changes, timeout_s=timeout_s)


def resume(timeout_s: float | None = None) -> None:
    """Brings back what `suspend` set aside: see `Cache.resume`."""
    for cache in _registry().caches():
        cache.resume(timeout_s)


def _registry() -> _Registry:
    return _REGISTRIES.setdefault(os.getpid(), _Registry())


def _path(target: str | os.PathLike[str] | None) -> str:
    return os.fspath(socket_path(target or default_target()))


_Key = tuple[str, str]
"""Socket and reference."""


@dataclass(slots=True)
class _Entry:
    """What is known under one reference; ``lock`` is held by whoever attaches it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Model | None = None
    options: dict[str, Any] = field(default_factory=dict)


class _Registry:
    """The connections and models of one process. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: dict[str, Cache] = {}
        self._entries: dict[_Key, _Entry] = {}

    def load(
        self, ref: str, target: str | os.PathLike[str] | None, timeout_s: float | None, options: dict[str, Any]
    ) -> Model:
        wait, chosen = bool(options.pop("wait", False)), options
        key, deadline = (_path(target), ref), Deadline(timeout_s)
        entry = self._locked(key, deadline)
        try:
            if entry.model is None or not _is_usable(entry.model):
                chosen = chosen or entry.options
                entry.model = self._attach(key, deadline, chosen)
                entry.options = chosen
            elif chosen and chosen != entry.options:
                raise InvalidRequestError(
                    f"{ref} is loaded with the options {entry.options}, and cannot be with {chosen}",
                    hint="unload it first, or use Cache.attach for one of your own",
                    value=chosen,
                )
            model = entry.model
        finally:
            entry.lock.release()
        if wait:
            model.wait(deadline.left_s())
        return model

    def _locked(self, key: _Key, deadline: Deadline) -> _Entry:
        """What is known under this key; the caller has its lock."""
        while True:
            with self._lock:
                entry = self._entries.setdefault(key, _Entry())
            left_s = deadline.left_s()
            if not entry.lock.acquire(timeout=-1 if left_s is None else left_s):
                raise TimeoutExpiredError(
                    f"another thread still attaches {key[1]}",
                    hint="give more time",
                    what=key[1],
                    timeout_s=deadline.timeout_s,
                )
            with self._lock:
                if self._entries.get(key) is entry:
                    return entry
            entry.lock.release()  # `unload` forgot it meanwhile: what was attached in it would be nobody's

    def _attach(self, key: _Key, deadline: Deadline, options: dict[str, Any]) -> Model:
        model = self.cache(key[0]).attach(key[1], timeout_s=deadline.left_s(), **options)
        for other in self._same(key[0], model, options):
            model.close()
            return other
        return model

    def _same(self, path: str, model: Model, options: dict[str, Any]) -> list[Model]:
        """What another reference led to, if it is the same revision of the same model."""
        with self._lock:
            entries = [entry for (socket, _), entry in self._entries.items() if socket == path]
        return [
            entry.model
            for entry in entries
            if entry.model is not None
            and (entry.model.name, entry.model.revision, entry.options) == (model.name, model.revision, options)
            and _is_usable(entry.model)
        ]

    def cache(self, path: str) -> Cache:
        with self._lock:
            if path not in self._caches:
                self._caches[path] = connect(path)
            return self._caches[path]

    def caches(self) -> list[Cache]:
        with self._lock:
            return list(self._caches.values())

    def unload(self, key: _Key | None) -> None:
        with self._lock:
            keys = list(self._entries) if key is None else [key]
            entries = [self._entries.pop(key) for key in keys if key in self._entries]
        for entry in entries:
            with entry.lock:
                if entry.model is not None:
                    entry.model.close()


def _is_usable(model: Model) -> bool:
    if model.suspended:
        raise SuspendedError(f"{model.name} is suspended", hint="call cached_client.resume() first", ref=model.name)
    return not (model.closed or model.failed or model.damaged or model.lease_lost)
