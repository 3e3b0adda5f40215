"""Whether users may come: weights loaded, warm-up passed, and the model not lost since."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cached_client.errors import NotReadyError
from cached_client.warmup.shapes import WarmUp, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger("cached_client")


class State(StrEnum):
    """Where a worker stands."""

    COLD = "cold"
    LOADING = "loading"
    WARMING = "warming"
    WARM = "warm"


class Watched(Protocol):
    """What can be lost: `cached_client.Model` is one."""

    name: str

    @property
    def lease_lost(self) -> object | None:
        """Why its lease is lost, if it is."""
        ...

    @property
    def damaged(self) -> tuple[object, ...]:
        """What of it was found damaged."""
        ...

    @property
    def failed(self) -> bool:
        """Whether its load failed."""
        ...

    @property
    def suspended(self) -> bool:
        """Whether it was suspended, and not resumed since."""
        ...


M = TypeVar("M", bound=Watched)


@dataclass(frozen=True, slots=True)
class Status:
    """A moment of a `Readiness`.

    Attributes:
        ready: users may come.
        state: ``cold``, ``loading``, ``warming`` or ``warm``.
        reason: why it is not ready, a sentence; empty when it is.
        since_time_s: when it came into this state, in Unix time.
        models: the models that are watched.
    """

    ready: bool
    state: str
    reason: str
    since_time_s: float
    models: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain data, as ``/ready`` answers it."""
        return {**asdict(self), "models": list(self.models)}


class Readiness:
    """cold → loading → warming → warm, and back to cold when the model is lost. Any thread may use it.

    It is ready only while it is warm: the weights of the current load are in place, and a warm-up that began after
    that has passed. Whenever it is asked it looks at the models that it watches: one whose lease is lost
    (`Model.lease_lost`), of which bytes were found damaged (`Model.damaged`), whose load failed, or which is suspended,
    makes it cold. From there a new load leads back. What an earlier load or warm-up still does then no longer counts.

    ``on_change`` is called with each new `Status`, in the thread that brought it about, outside of any lock. What it
    raises is logged: it must not stand between a probe and its answer.
    """

    def __init__(self, on_change: Callable[[Status], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._on_change = on_change
        self._state = State.COLD
        self._reason = "nothing was loaded yet"
        self._since_time_s = time.time()
        self._models: list[Watched] = []
        self._load = 0
        """Counts the loads: what belongs to an earlier one changes nothing any more."""
        self._warm_up: WarmUp | None = None

    # Asked.

    @property
    def ready(self) -> bool:
        """Whether users may come."""
        return self.status().ready

    @property
    def state(self) -> State:
        """Where the worker stands now."""
        return State(self.status().state)

    @property
    def warm_up_result(self) -> WarmUp | None:
        """How the last warm-up went; None before the first."""
        return self._warm_up

    def status(self) -> Status:
        """All of it at one moment. Does not block: fit for an event loop."""
        with self._lock:
            changed = self._look()
            status = self._status()
        self._tell(status if changed else None)
        return status

    def check(self) -> None:
        """Raises NotReadyError, saying why, unless users may come."""
        status = self.status()
        if not status.ready:
            raise NotReadyError(f"this worker is {status.state}: {status.reason}", hint="try again in a moment")

    # Told.

    @contextmanager
    def loading(self) -> Iterator[Loading]:
        """A load, for as long as the block runs; when it ends well the weights are in place, and warm-up may begin.

        Begins anew from any state. If the block raises, the worker is cold, and the reason says what was raised.
        """
        with self._lock:
            self._load += 1
            load = self._load
            self._models = []
            status = self._set(State.LOADING, "the weights are being loaded")
        self._tell(status)
        try:
            yield Loading(self, load)
        except BaseException as error:
            self._move(load, State.LOADING, State.COLD, f"the load failed: {type(error).__name__}: {error}")
            raise
        self._move(load, State.LOADING, State.WARMING, "the warm-up has not passed yet")

    def warm_up(self, call: Callable[[int, int], object], **options: Any) -> WarmUp:
        """Runs `warm_up` with these arguments, and is warm if it passed and nothing was lost meanwhile.

        Raises NotReadyError where nothing is loaded, or what was loaded is lost before it ends, and WarmUpError where a
        shape failed: then the worker stays in ``warming``, and may try again.
        """
        with self._lock:
            changed = self._look()
            load, status = self._load, self._status()
        self._tell(status if changed else None)
        if status.state not in {State.WARMING, State.WARM}:
            raise NotReadyError(
                f"there is nothing to warm up: {status.reason}", hint="load within `with readiness.loading():` first"
            )
        result = warm_up(call, keep_going=lambda: self._is_current(load), **options)
        self._warm_up = result
        if self._is_current(load) and result.failed:
            told = ", ".join(f"{shape.name} ({shape.error})" for shape in result.failed)
            self._move(load, None, State.WARMING, f"the warm-up failed for {told}")
            result.check()
        self._move(load, None, State.WARM, "")
        self._require(load)
        return result

    def lost(self, reason: str) -> None:
        """The worker cannot serve any more: it is cold until the next load."""
        with self._lock:
            changed = self._state is not State.COLD
            self._load += 1
            status = self._set(State.COLD, reason)
        if changed:
            _log.warning("not ready any more: %s", reason)
        self._tell(status)

    # Shared with Loading.

    def watch(self, load: int, model: Watched) -> None:
        """For `Loading.watch`."""
        with self._lock:
            if load == self._load:
                self._models.append(model)

    def _is_current(self, load: int) -> bool:
        status = self.status()
        return self._load == load and status.state != State.COLD

    def _require(self, load: int) -> None:
        status = self.status()
        if self._load != load or not status.ready:
            raise NotReadyError(f"the model was lost during the warm-up: {status.reason or 'it is loaded anew'}")

    def _move(self, load: int, before: State | None, after: State, reason: str) -> None:
        """Into a state, unless the load was lost or another one began; ``before`` None: from where it is, if loaded."""
        with self._lock:
            changed = self._look()
            here = {before} if before else {State.WARMING, State.WARM}
            if load == self._load and self._state in here:
                self._set(after, reason)
                changed = True
            status = self._status()
        self._tell(status if changed else None)

    # Within the lock.

    def _look(self) -> bool:
        """Whether a watched model turned out to be lost."""
        if self._state is State.COLD:
            return False
        for model in self._models:
            if model.lease_lost is not None:
                why = f"the lease of {model.name} is lost: {model.lease_lost}"
            elif model.damaged:
                why = f"{model.name} is damaged in memory: {model.damaged[0]}"
            elif model.suspended:
                why = f"{model.name} is suspended"
            elif model.failed:
                why = f"the load of {model.name} failed"
            else:
                continue
            self._load += 1
            self._set(State.COLD, why)
            _log.warning("not ready any more: %s", why)
            return True
        return False

    def _set(self, state: State, reason: str) -> Status:
        if state is not self._state:
            self._since_time_s = time.time()
        self._state, self._reason = state, reason
        return self._status()

    def _status(self) -> Status:
        return Status(
            ready=self._state is State.WARM,
            state=self._state.value,
            reason=self._reason,
            since_time_s=self._since_time_s,
            models=tuple(model.name for model in self._models),
        )

    def _tell(self, status: Status | None) -> None:
        if status is None or self._on_change is None:
            return
        try:
            self._on_change(status)
        except Exception:  # noqa: BLE001 the caller's own fault, told where he looks
            _log.exception("on_change of a readiness failed")


class Loading:
    """A load that is under way."""

    def __init__(self, readiness: Readiness, load: int) -> None:
        """For `Readiness.loading`."""
        self._readiness = readiness
        self._load = load

    def watch(self, model: M) -> M:
        """The model, whose loss ends the readiness that this load leads to."""
        self._readiness.watch(self._load, model)
        return model
