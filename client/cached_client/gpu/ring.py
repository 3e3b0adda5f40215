"""The pinned ring: steps of pinned memory, the threads that fill them, and the one that waits for their copies.

A step is filled by all threads together, a slot each, and goes to the device as one copy by whichever of them is last.
It is filled again only after the event behind that copy: another thread waits for the events, so that nobody who fills
or feeds ever waits for the device while there is a free step.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cached_client.errors import DeviceError
from cached_client.gpu.device import as_cache_error
from cached_client.gpu.options import MIB, PAGE_BYTES, Geometry
from cached_client.gpu.topology import bound_to

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt
    import torch

    from cached_client.errors import CacheError
    from cached_client.gpu.device import Device, Event, Pinned
    from cached_client.gpu.image import Image, Rows

_log = logging.getLogger("cached_client")

_LEAST_SHARE_BYTES = MIB
"""A thread that fills less than this costs more to wake than it helps."""

_DIRECT_IN_FLIGHT = 8


@dataclass(slots=True, eq=False)
class Window:
    """A range of a file's image that can be copied now.

    ``runs`` are its bytes in the file, as `Image.runs`; ``source`` holds the file's bytes from ``source_begin`` on;
    ``target`` is the place on the device, just as long.
    """

    file_index: int
    buffer_index: int
    image: Image
    low: int
    high: int
    runs: list[tuple[int, Rows]]
    source: npt.NDArray[np.uint8]
    source_begin: int
    target: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of the image, with the gaps between tensors."""
        return self.high - self.low

    def fill(self, begin: int, end: int, memory: npt.NDArray[np.uint8]) -> None:
        """Puts bytes ``[begin, end)`` of the window into ``memory``."""
        self.image.gather(self.low + begin, self.low + end, self.source, self.source_begin, memory)


@dataclass(slots=True, eq=False)
class Step:
    """One step of the ring: ``memory`` is ``pinned`` from ``begin`` on."""

    pinned: Pinned
    begin: int
    memory: npt.NDArray[np.uint8]
    shares_left: int = 0


class Ring:
    """Pinned memory in steps. It belongs to one load at a time."""

    def __init__(self, device: Device, geometry: Geometry, processors: frozenset[int] | None) -> None:
        """Pins, with the memory on the NUMA node of ``processors``. Raises PinningError."""
        self.geometry: Geometry = geometry
        self.processors: frozenset[int] | None = processors
        self.pinned: Pinned
        self.without: str
        with bound_to(processors):
            self.pinned, self.without = device.pin(geometry.size_bytes)
        size_bytes = geometry.step_bytes
        self.steps: list[Step] = [
            Step(self.pinned, begin, self.pinned.array[begin : begin + size_bytes])
            for begin in range(0, geometry.size_bytes, size_bytes)
        ]

    def release(self) -> None:
        """Unpins. Idempotent."""
        self.steps = []
        self.pinned.release()


class Rings:
    """The rings of this process that no load uses: at most one for each device. Any thread may use it.

    A ring is the memory of pinned pages that a driver knows of: it must be given back before the process ends, and a
    child process must not use its parent's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, Ring] = {}
        self._watched = False

    def take(self, device: Device, geometry: Geometry, processors: frozenset[int] | None) -> Ring:
        """A ring for one load: the idle one if it is of that shape, else a new one. Raises PinningError."""
        with self._lock:
            if not self._watched:
                atexit.register(self.release)
                os.register_at_fork(after_in_child=self._forget)
                self._watched = True
            ring = self._idle.pop(device.name, None)
        if ring is not None and (ring.geometry, ring.processors) == (geometry, processors):
            return ring
        if ring is not None:
            ring.release()
        return Ring(device, geometry, processors)

    def give_back(self, device: Device, ring: Ring, *, usable: bool) -> None:
        """After a load. ``usable``: no copy is in flight, and the device is well."""
        with self._lock:
            if usable and device.name not in self._idle:
                self._idle[device.name] = ring
                return
        ring.release()

    def release(self) -> None:
        """Unpins the idle rings."""
        with self._lock:
            idle, self._idle = list(self._idle.values()), {}
        for ring in idle:
            ring.release()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._idle = {}


RINGS = Rings()


class StoppedError(Exception):
    """The pump was stopped, or failed: whoever feeds it gives up. Never leaves this package."""


class Pump:
    """Moves windows through a ring, or straight from pinned mappings, to the device.

    One thread feeds it (`push`, `push_direct`, `finish`). ``landed`` is called with each window whose copy is complete,
    by the pump's own thread, and ``failed`` at most once, by any. After `stop` nothing of it is left: no thread, and no
    copy in flight.
    """

    def __init__(
        self,
        device: Device,
        ring: Ring,
        *,
        landed: Callable[[Window], None],
        failed: Callable[[CacheError], None],
    ) -> None:
        self._device = device
        self._ring = ring
        self._landed = landed
        self._failed = failed
        self._changed = threading.Condition()
        self._free = list(ring.steps)
        self._in_flight = 0
        self._direct_in_flight = 0
        self._ended = False
        self._shares: queue.SimpleQueue[tuple[Step, Window, int, int] | None] = queue.SimpleQueue()
        self._copies: queue.SimpleQueue[tuple[Event, Step | None, Window] | None] = queue.SimpleQueue()
        self._fillers = [
            threading.Thread(target=self._fill, name=f"cached-gpu-fill-{index}", daemon=True)
            for index in range(ring.geometry.threads)
        ]
        self._waiter = threading.Thread(target=self._wait, name="cached-gpu-wait", daemon=True)
        self.copies: int = 0
        self.copied_bytes: int = 0
        self.ring_wait_s: float = 0.0

    def start(self) -> None:
        """Starts its threads. If it raises, `stop` is still needed."""
        for thread in (*self._fillers, self._waiter):
            thread.start()

    # By the feeder.

    def push(self, window: Window) -> None:
        """Takes a window of at most a step's size; waits for a free step. Raises StoppedError."""
        step = self._take_step()
        shares = _shares(window.size_bytes, self._ring.geometry.threads)
        step.shares_left = len(shares)
        for begin, end in shares:
            self._shares.put((step, window, begin, end))

    def push_direct(self, window: Window, pieces: Sequence[tuple[Pinned, int, torch.Tensor]]) -> None:
        """Copies a window from where it lies: ``(pinned, begin, target)`` each. Raises StoppedError."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._direct_in_flight < _DIRECT_IN_FLIGHT)
            if self._ended:
                raise StoppedError
            self._direct_in_flight += 1
            self._in_flight += 1
        try:
            for pinned, begin, target in pieces:
                self._device.copy(pinned, begin, target)
            self._enqueued(None, window, copies=len(pieces), size_bytes=sum(p[2].numel() for p in pieces))
        except Exception as error:  # noqa: BLE001 it must reach the consumer, whose thread is another
            self._fail(error)

    def finish(self) -> None:
        """Returns when every window has landed. Raises StoppedError."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._in_flight)
            if self._ended:
                raise StoppedError

    # By anyone.

    def end(self) -> None:
        """Fills and copies nothing more; who waits in the pump is woken. Idempotent, does not wait."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> bool:
        """Ends its threads and waits for what is in flight; whether the ring and the device are still good."""
        self.end()
        for _ in self._fillers:
            self._shares.put(None)
        for thread in self._fillers:
            _join(thread)
        self._copies.put(None)
        _join(self._waiter)
        try:
            # The copy that failed may have others behind it: none may read the ring when it is unpinned or used again.
            self._device.drain()
        except DeviceError as error:
            _log.warning("%s is not usable after a failed copy: %s", self._device.name, error)
            return False
        return True

    # Its threads.

    def _take_step(self) -> Step:
        began_s = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._free)
            self.ring_wait_s += time.monotonic() - began_s
            if self._ended:
                raise StoppedError
            self._in_flight += 1
            return self._free.pop(0)

    def _fill(self) -> None:
        with bound_to(self._ring.processors):
            while (share := self._shares.get()) is not None:
                step, window, begin, end = share
                try:
                    self._fill_share(step, window, begin, end)
                except Exception as error:  # noqa: BLE001 it must reach the consumer, not end in a silent thread
                    self._fail(error)
                del share, step, window  # while the thread waits for more it holds on to no mapping

    def _fill_share(self, step: Step, window: Window, begin: int, end: int) -> None:
        if self._ended:
            return
        window.fill(begin, end, step.memory[begin:end])
        with self._changed:
            step.shares_left -= 1
            last = step.shares_left == 0
        if last and not self._ended:
            self._device.copy(step.pinned, step.begin, window.target)
            self._enqueued(step, window, copies=1, size_bytes=window.size_bytes)

    def _enqueued(self, step: Step | None, window: Window, *, copies: int, size_bytes: int) -> None:
        event = self._device.record()
        with self._changed:
            self.copies += copies
            self.copied_bytes += size_bytes
        self._copies.put((event, step, window))

    def _wait(self) -> None:
        while (copy := self._copies.get()) is not None:
            event, step, window = copy
            try:
                event.wait()
                self._landed(window)
                self._free_again(step)
            except Exception as error:  # noqa: BLE001 as above
                self._fail(error)
            del copy, event, step, window

    def _free_again(self, step: Step | None) -> None:
        with self._changed:
            self._in_flight -= 1
            if step is None:
                self._direct_in_flight -= 1
            else:
                self._free.append(step)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            first, self._ended = not self._ended, True
            self._changed.notify_all()
        if first:
            self._failed(as_cache_error(error, self._device.name))


def _join(thread: threading.Thread) -> None:
    if thread.ident is not None:  # else it was never started
        thread.join()


def _shares(size_bytes: int, threads: int) -> list[tuple[int, int]]:
    """A window's bytes divided among the threads, in whole pages."""
    share_bytes = max(_LEAST_SHARE_BYTES, -(-size_bytes // threads))
    share_bytes = -(-share_bytes // PAGE_BYTES) * PAGE_BYTES
    return [(begin, min(size_bytes, begin + share_bytes)) for begin in range(0, size_bytes, share_bytes)]
