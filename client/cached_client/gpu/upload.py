"""One load to a device: what has arrived becomes windows, windows go through the pump, landed tensors are handed out.

A thread of its own feeds the pump, so that bytes go on crossing while the consumer works on what it got.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cached_client._ranges import RangeSet
from cached_client.errors import CacheError, TimeoutExpiredError
from cached_client.gpu.device import as_cache_error
from cached_client.gpu.image import ALIGN_BYTES, Image, slice_of
from cached_client.gpu.options import MIB
from cached_client.gpu.ring import Pump, StoppedError, Window
from cached_client.torch import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

    import torch

    from cached_client._arrivals import Arrivals, Deadline
    from cached_client._index import TensorIndex
    from cached_client.gpu.device import Device, Pinned
    from cached_client.gpu.image import Place, Rows, Slice, Slices
    from cached_client.gpu.ring import Ring
    from cached_client.safetensors_header import TensorInfo

_WINDOWS_AT_ONCE = 32
"""How many windows are planned before the arrivals are looked at again."""

_DIRECT_BYTES = MIB
"""From a registered mapping, runs shorter than this on the average go through the ring: a copy costs microseconds."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to load: ``names`` (None: all), this rank's ``slices``, in buffers of ``buffer_bytes`` (None: a file's)."""

    names: frozenset[str] | None = None
    slices: Slices | None = None
    buffer_bytes: int | None = None
    ahead_bytes: int | None = None


@dataclass(slots=True, eq=False)
class _Flat:
    """A buffer on the device, as long as one of its tensors was not taken by the consumer."""

    memory: torch.Tensor | None
    size_bytes: int
    tensors_to_come: int
    tensors_untaken: int


@dataclass(slots=True, eq=False)
class _File:
    image: Image
    dtypes: dict[str, torch.dtype]
    planned: RangeSet = field(default_factory=RangeSet)
    landed: RangeSet = field(default_factory=RangeSet)
    flats: dict[int, _Flat] = field(default_factory=dict)
    unplanned_bytes: int = 0


class Upload:
    """Hands out the tensors of a model on a device, each when all its bytes are there. For one iteration.

    Leaving the iteration early, by ``close``, an exception or garbage collection, stops the load: its threads end, and
    the device is done with the ring before that returns.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        index: TensorIndex,
        device: Device,
        ring: Ring,
        wanted: Wanted,
        deadline: Deadline,
        registered: Mapping[int, Pinned] | None = None,
    ) -> None:
        """``registered``: whole files by index that the device can read where they are."""
        self._arrivals = arrivals
        self._index = index
        self._device = device
        self._step_bytes = ring.geometry.step_bytes
        self._wanted = wanted
        self._deadline = deadline
        self._registered = registered or {}
        self._files: dict[int, _File] = {}
        self._changed = threading.Condition()
        self._ready: deque[tuple[str, torch.Tensor, _Flat | None]] = deque()
        self._ahead_bytes = 0
        self._finished = False
        self._stopping = False
        self._any_landed = False
        self._failure: Exception | None = None
        self._callers_failure: Exception | None = None
        self._began_s = self._ended_s = time.monotonic()
        self.arrival_wait_s: float = 0.0
        self.usable: bool = True
        self.pump: Pump = Pump(device, ring, landed=self._land, failed=self._fail)
        self._feeder = threading.Thread(target=self._feed, name="cached-gpu-feed", daemon=True)

    @property
    def seconds(self) -> float:
        """From the begin to the last copy."""
        return self._ended_s - self._began_s

    def tensors(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yields ``(name, tensor)`` as they land. Raises what ended the load. `usable` is known afterwards."""
        try:
            self.pump.start()
            self._feeder.start()
            while batch := self._next():
                while batch:
                    name, tensor, flat = batch.popleft()
                    yield name, tensor
                    del tensor  # the consumer's now: its memory must be free when the consumer drops it
                    self._taken(flat)
        finally:
            self._stop()

    # In the consumer's thread.

    def _next(self) -> deque[tuple[str, torch.Tensor, _Flat | None]]:
        with self._changed:
            left_s = self._deadline.left_s()
            came = self._changed.wait_for(lambda: self._ready or self._finished or self._failure, left_s)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if not came:
                raise TimeoutExpiredError(
                    f"the copy to {self._device.name} did not end within {self._deadline.timeout_s:g} s",
                    hint="it was stopped; what is in memory on this host stays there",
                    what=self._device.name,
                    timeout_s=self._deadline.timeout_s,
                )
            batch, self._ready = self._ready, deque()
            return batch

    def _taken(self, flat: _Flat | None) -> None:
        if flat is None or self._wanted.ahead_bytes is None:
            return
        flat.tensors_untaken -= 1
        if not flat.tensors_untaken:
            with self._changed:
                self._ahead_bytes -= flat.size_bytes
            self._arrivals.wake()  # the feeder may wait for room

    def _stop(self) -> None:
        self._stopping = True
        self.pump.end()
        self._arrivals.wake()
        if self._feeder.ident is not None:
            self._feeder.join()
        self.usable = self.pump.stop()
        if self._callers_failure is not None:
            # It keeps the way to the caller's mistake, but not what the frames on it hold: mappings, device memory.
            traceback.clear_frames(self._callers_failure.__traceback__)
            self._callers_failure = None
        self._ready.clear()
        self._files.clear()

    # In the feeder's thread.

    def _feed(self) -> None:
        try:
            while batch := self._wait_for_windows():
                while batch:
                    self._push(batch.popleft())
            self.pump.finish()
            self._ended_s = time.monotonic()
            with self._changed:
                self._finished = True
                self._changed.notify_all()
        except StoppedError:
            pass  # the consumer stopped, or the pump failed and has told why
        except Exception as error:  # noqa: BLE001 it must reach the consumer, whose thread is another
            self._fail(error if error is self._callers_failure else as_cache_error(error, self._device.name))

    def _wait_for_windows(self) -> deque[Window]:
        began_s = time.monotonic()
        try:
            return self._arrivals.wait_for(self._plan, self._deadline, "what is to be copied to the device")
        finally:
            self.arrival_wait_s += time.monotonic() - began_s

    def _push(self, window: Window) -> None:
        pinned = self._registered.get(window.file_index)
        long = window.size_bytes >= len(window.runs) * _DIRECT_BYTES
        if pinned is None or not long or any(rows.number > 1 for _, rows in window.runs):
            self.pump.push(window)
            return
        pieces: list[tuple[Pinned, int, torch.Tensor]] = []
        for at, rows in window.runs:
            begin = at - window.low
            pieces.append((pinned, rows.begin, window.target[begin : begin + rows.size_bytes]))
        self.pump.push_direct(window, pieces)

    def _plan(self) -> deque[Window] | None:
        """Windows that can be copied now; empty when there will be no more; None: wait for more to arrive."""
        windows: deque[Window] = deque()
        if self._stopping:
            return windows
        weight_files = self._index.weight_files()
        for file_index in weight_files or ():
            if file_index not in self._files:
                header = self._index.header(file_index)
                if header is not None:
                    self._open(file_index, header.tensors.values())
        for file_index, file in self._files.items():
            if file.unplanned_bytes and len(windows) < _WINDOWS_AT_ONCE:
                self._plan_file(file_index, file, windows)
        planned = not any(file.unplanned_bytes for file in self._files.values())
        finished = weight_files is not None and len(self._files) == len(weight_files) and planned
        return windows if windows or finished else None

    def _open(self, file_index: int, tensors: Iterable[TensorInfo]) -> None:
        """The header of a file is there: lays out its tensors."""
        names = self._wanted.names
        infos = [info for info in tensors if names is None or info.name in names]
        image = Image(infos, self._slices_of(infos), buffer_bytes=self._wanted.buffer_bytes)
        # A dtype that torch lacks is told before anything is copied.
        dtypes = {name: torch_dtype(info) for name, info in {info.dtype: info for info in infos}.items()}
        unplanned_bytes = sum(place.size_bytes for place in image.places)
        self._files[file_index] = _File(image, dtypes, unplanned_bytes=unplanned_bytes)
        empty = [place for place in image.places if not place.size_bytes]
        if empty:
            carved = _carved(self._device.allocate(0), 0, empty, dtypes)
            self._hand_out([(place.info.name, tensor, None) for place, tensor in zip(empty, carved, strict=True)])

    def _slices_of(self, infos: list[TensorInfo]) -> dict[str, Slice] | None:
        """By the caller's function, if there is one: what that raises is not ours to translate."""
        if self._wanted.slices is None:
            return None
        try:
            found = {info.name: slice_of(info, self._wanted.slices) for info in infos}
        except CacheError:
            raise
        except Exception as error:
            self._callers_failure = error
            raise
        return {name: part for name, part in found.items() if part is not None}

    def _plan_file(self, file_index: int, file: _File, windows: deque[Window]) -> None:
        for begin, end in self._arrivals.spans(file_index):
            for gap in file.planned.gaps(*file.image.range_of(begin, end)):
                for buffer_index, low, high in file.image.parts(*gap):
                    # Without room for it, later buffers that were begun must go on: or there would never be room.
                    if self._has_room(file, buffer_index):
                        self._plan_part(file_index, buffer_index, low, high, windows)
                    if len(windows) == _WINDOWS_AT_ONCE:
                        return

    def _plan_part(self, file_index: int, buffer_index: int, low: int, high: int, windows: deque[Window]) -> None:
        """Of one buffer."""
        file = self._files[file_index]
        for at in range(low, high, self._step_bytes):
            end = min(high, at + self._step_bytes)
            runs = file.image.runs(at, end)
            if runs:
                view = self._arrivals.view(file_index, runs[0][1].begin, runs[-1][1].end)
                if view is None or len(windows) == _WINDOWS_AT_ONCE:
                    return  # None: the daemon was restarted, and announces anew what is in place
                windows.append(self._window(file_index, buffer_index, at, end, runs, view))
            file.planned.add(at, end)
            file.unplanned_bytes -= sum(rows.total_bytes for _, rows in runs)

    def _has_room(self, file: _File, buffer_index: int) -> bool:
        """Whether the buffer exists, or may be made: not too much may lie on the device untaken."""
        limit, buffer = self._wanted.ahead_bytes, file.image.buffers[buffer_index]
        with self._changed:
            ahead_bytes = self._ahead_bytes
        return (
            buffer_index in file.flats
            or limit is None
            or not ahead_bytes
            or ahead_bytes + buffer.end - buffer.begin <= limit
        )

    def _window(
        self, file_index: int, buffer_index: int, low: int, high: int, runs: list[tuple[int, Rows]], view: memoryview
    ) -> Window:
        import numpy as np

        file = self._files[file_index]
        buffer = file.image.buffers[buffer_index]
        flat = file.flats.get(buffer_index)
        if flat is None:
            size_bytes = -(-(buffer.end - buffer.begin) // ALIGN_BYTES) * ALIGN_BYTES  # whole elements of any dtype
            flat = _Flat(self._device.allocate(size_bytes), size_bytes, buffer.tensors, buffer.tensors)
            with self._changed:
                file.flats[buffer_index] = flat
                self._ahead_bytes += size_bytes
        if flat.memory is None:
            raise AssertionError("a buffer was given away before its last window")
        target = flat.memory[low - buffer.begin : high - buffer.begin]
        source = np.frombuffer(view, np.uint8)
        return Window(file_index, buffer_index, file.image, low, high, runs, source, runs[0][1].begin, target)

    # In the pump's threads.

    def _land(self, window: Window) -> None:
        """The bytes of a window are on the device: hands out the tensors that are whole by that."""
        # Raises for bytes that were found damaged after they had been planned: they may be in the copy.
        self._arrivals.view(window.file_index, window.source_begin, window.runs[-1][1].end)
        file = self._files[window.file_index]
        flat, buffer = file.flats[window.buffer_index], file.image.buffers[window.buffer_index]
        file.landed.add(window.low, window.high)
        begin, end = file.landed.span_at(window.low)
        # Windows do not overlap: only one of them is a tensor's last.
        places = [
            place
            for place in file.image.places_in(window.low, window.high)
            if begin <= place.offset and place.end <= end
        ]
        ready: list[tuple[str, torch.Tensor, _Flat | None]] = []
        if places and flat.memory is not None:
            carved = _carved(flat.memory, buffer.begin, places, file.dtypes)
            ready = [(place.info.name, tensor, flat) for place, tensor in zip(places, carved, strict=True)]
        flat.tensors_to_come -= len(ready)
        if not flat.tensors_to_come:
            flat.memory = None  # only its tensors hold it now
        if ready and not self._any_landed:
            self._any_landed = True
            self._arrivals.mark("device_first")
        self._hand_out(ready)

    def _hand_out(self, tensors: list[tuple[str, torch.Tensor, _Flat | None]]) -> None:
        with self._changed:
            self._ready.extend(tensors)
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        self._stopping = True
        self.pump.end()
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self._arrivals.wake()


def _carved(
    memory: torch.Tensor, begin: int, places: Sequence[Place], dtypes: Mapping[str, torch.dtype]
) -> Iterator[torch.Tensor]:
    """The tensors at ``places`` of an image whose part from ``begin`` on is ``memory``."""
    typed = {name: (memory.view(dtype), dtype.itemsize) for name, dtype in dtypes.items()}
    strides: dict[tuple[int, ...], list[int]] = {}
    for info, shape, _, offset, _ in places:
        whole, item_bytes = typed[info.dtype]
        if shape not in strides:
            strides[shape] = _contiguous(shape)
        yield whole.as_strided(shape, strides[shape], (offset - begin) // item_bytes if len(memory) else 0)


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(shape[dim], 1)
    return strides
