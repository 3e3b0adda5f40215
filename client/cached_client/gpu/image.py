"""Where each tensor of a file goes on the device, and which bytes of the file fill which part of that. Pure.

The tensors of a file, or a rank's slices of them, are laid one after another into an **image**: a range of positions,
each tensor at a multiple of `ALIGN_BYTES`, in the order of their bytes in the file. What a range of file bytes fills is
therefore one range of the image, and what a range of the image needs is one range of the file. The image is cut into
flat buffers between tensors; the ring copies windows of it.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cached_client.dtypes import DTYPES
from cached_client.errors import InvalidRequestError
from cached_client.safetensors_header import TensorInfo
from cached_client.torch import torch_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    import numpy.typing as npt

ALIGN_BYTES = 256
"""What an allocation on a device is aligned to; more than any dtype asks for, and what vectorised kernels like."""

Slice = tuple[int, int, int]
"""``(dim, start, stop)`` in elements, as ``tensor.narrow(dim, start, stop - start)``."""

Slices = Mapping[str, Slice] | Callable[[TensorInfo], Slice | None]
"""The slice of each tensor that this rank wants, by name or by a function; None, or no entry: all of it."""


class Rows(NamedTuple):
    """Bytes of a file: ``number`` runs of ``size_bytes`` each, every ``stride_bytes`` from ``begin`` on."""

    begin: int
    number: int
    size_bytes: int
    stride_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all runs."""
        return self.number * self.size_bytes

    @property
    def end(self) -> int:
        """Where the last run ends in the file."""
        return self.begin + (self.number - 1) * self.stride_bytes + self.size_bytes

    def filled_until(self, end: int) -> int:
        """How many of its bytes are there, from its own first on, if the file is there until ``end``."""
        if self.number == 1:
            return min(max(0, end - self.begin), self.size_bytes)
        whole = (end - self.begin - self.size_bytes) // self.stride_bytes + 1
        return min(max(0, whole), self.number) * self.size_bytes

    def missing_until(self, begin: int) -> int:
        """How many of its bytes are not there, from its own first on, if the file is there from ``begin`` on."""
        if self.number == 1:
            return min(max(0, begin - self.begin), self.size_bytes)
        return min(max(0, -(-(begin - self.begin) // self.stride_bytes)), self.number) * self.size_bytes


class Place(NamedTuple):
    """A tensor in the image: ``shape`` is torch's, of what is wanted of it; ``offset`` where it begins."""

    info: TensorInfo
    shape: tuple[int, ...]
    rows: Rows
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """Where it ends in the image."""
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class Buffer:
    """A range of the image that is one allocation on the device, and how many tensors are in it."""

    begin: int
    end: int
    tensors: int


def slice_of(info: TensorInfo, slices: Slices | None) -> Slice | None:
    """What is wanted of a tensor, with a ``dim`` counted from the front.

    Raises InvalidRequestError, and whatever the caller's own function raises, as it is.
    """
    if slices is None:
        return None
    wanted = slices.get(info.name) if isinstance(slices, Mapping) else slices(info)
    if wanted is None:
        return None
    shape = torch_shape(info)
    dim, start, stop = _numbers(wanted) or (len(shape), 0, 0)
    if not -len(shape) <= dim < len(shape) or not 0 <= start <= stop <= shape[dim]:
        raise InvalidRequestError(
            f"the slice {wanted} does not fit {info.name!r} of shape {list(shape)}",
            hint="a slice is (dim, start, stop), with 0 <= start <= stop <= the extent of dim",
            value=wanted,
            tensor=info.name,
        )
    return dim % len(shape), start, stop


def _numbers(wanted: Slice) -> Slice | None:
    """The three integers of a slice; None for what is no slice."""
    try:
        dim, start, stop = (operator.index(number) for number in wanted)
    except (TypeError, ValueError):
        return None
    return dim, start, stop


class Image:
    """The layout of one file. ``places`` are in the order of the file; ``align_bytes`` is a power of two."""

    def __init__(
        self,
        tensors: Iterable[TensorInfo],
        slices: Slices | None = None,
        *,
        buffer_bytes: int | None = None,
        align_bytes: int = ALIGN_BYTES,
    ) -> None:
        """``buffer_bytes``: begin a new buffer rather than one larger than this; None: one for all.

        Raises InvalidRequestError for a slice that does not fit, UnsupportedDtypeError as `torch_shape`.
        """
        self.places: list[Place] = []
        end = 0
        for info in sorted(tensors, key=lambda info: (info.begin, info.end)):
            begin = -(-end // align_bytes) * align_bytes
            place = _place(info, slice_of(info, slices) if slices else None, begin)
            self.places.append(place)
            if place.size_bytes:
                end = begin + place.size_bytes
        self._filled = [place for place in self.places if place.size_bytes]
        self._extents = _extents(self._filled)
        self._extent_begins = [at for at, _ in self._extents]
        self._begins = [place.rows.begin for place in self._filled]
        self._offsets = [place.offset for place in self._filled]
        self.size_bytes: int = end
        self.buffers: list[Buffer] = _buffers(self._filled, buffer_bytes)
        self._buffer_begins = [buffer.begin for buffer in self.buffers]

    def range_of(self, begin: int, end: int) -> tuple[int, int]:
        """The range of the image that the file's bytes ``[begin, end)`` fill; it may be empty."""
        if not self._filled:
            return 0, 0
        first = max(0, bisect_right(self._begins, begin) - 1)
        last = bisect_left(self._begins, end) - 1
        if last < 0:
            return 0, 0
        low = self._filled[first].offset + self._filled[first].rows.missing_until(begin)
        if low == self._filled[first].end and first + 1 < len(self._filled):
            low = self._filled[first + 1].offset
        filled_bytes = self._filled[last].rows.filled_until(end)
        high = self._filled[last].offset + filled_bytes
        if not filled_bytes:  # not even its first row: then the gap before it is of no use
            high = self._filled[last - 1].end if last else 0
        return low, max(low, high)

    def parts(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """``(buffer index, low, high)``: the range cut at buffers."""
        index = max(0, bisect_right(self._buffer_begins, low) - 1)
        while index < len(self.buffers) and self.buffers[index].begin < high:
            begin, end = max(low, self.buffers[index].begin), min(high, self.buffers[index].end)
            if begin < end:
                yield index, begin, end
            index += 1

    def places_in(self, low: int, high: int) -> list[Place]:
        """The tensors, other than empty ones, that have bytes in a range of the image."""
        first = max(0, bisect_right(self._offsets, low) - 1)
        last = bisect_left(self._offsets, high)
        return [place for place in self._filled[first:last] if place.end > low]

    def runs(self, low: int, high: int) -> list[tuple[int, Rows]]:
        """``(position in the image, bytes of the file)`` that fill a range, neighbours joined, in order."""
        runs: list[tuple[int, Rows]] = []
        first = max(0, bisect_right(self._extent_begins, low) - 1)
        for offset, rows in self._extents[first : bisect_left(self._extent_begins, high)]:
            begin, end = max(low - offset, 0), min(high - offset, rows.total_bytes)
            if rows.number == 1 and begin < end:
                runs.append((offset + begin, Rows(rows.begin + begin, 1, end - begin, end - begin)))
            else:
                runs.extend((offset + local, part) for local, part in _cut(rows, begin, end))
        return runs

    def gather(
        self, low: int, high: int, source: npt.NDArray[np.uint8], source_begin: int, target: npt.NDArray[np.uint8]
    ) -> None:
        """Copies a range of the image into ``target``. ``source`` holds the file's bytes from ``source_begin`` on.

        What lies between tensors is left as it is. Releases the GIL while it copies.
        """
        import numpy as np

        for at, rows in self.runs(low, high):
            begin, to = rows.begin - source_begin, at - low
            size_bytes = rows.total_bytes
            if rows.number == 1:
                np.copyto(target[to : to + size_bytes], source[begin : begin + size_bytes])
                continue
            shape = (rows.number, rows.size_bytes)
            np.copyto(
                target[to : to + size_bytes].reshape(shape),
                np.ndarray(shape, np.uint8, source, begin, (rows.stride_bytes, 1)),
            )


def _place(info: TensorInfo, wanted: Slice | None, offset: int) -> Place:
    shape = torch_shape(info)
    if wanted is None or wanted[1:] == (0, shape[wanted[0]]):
        size_bytes = info.end - info.begin
        return Place(info, shape, Rows(info.begin, 1, size_bytes, size_bytes), offset, size_bytes)
    dim, start, stop = wanted
    shape_wanted = (*shape[:dim], stop - start, *shape[dim + 1 :])
    count = _product(shape[:dim])
    # An item of torch's: a packed dtype has two elements in one.
    unit_bytes = _product(shape[dim + 1 :]) * DTYPES[info.dtype].item_bytes
    size_bytes = (stop - start) * unit_bytes
    if not size_bytes * count:
        return Place(info, shape_wanted, Rows(info.begin, 1, 0, 0), offset, 0)
    rows = Rows(info.begin + start * unit_bytes, count, size_bytes, shape[dim] * unit_bytes)
    return Place(info, shape_wanted, rows, offset, rows.total_bytes)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result


def _buffers(places: list[Place], buffer_bytes: int | None) -> list[Buffer]:
    buffers: list[Buffer] = []
    for place in places:
        last = buffers[-1] if buffers else None
        if last is not None and (buffer_bytes is None or place.end - last.begin <= buffer_bytes):
            buffers[-1] = Buffer(last.begin, place.end, last.tensors + 1)
        else:
            buffers.append(Buffer(place.offset, place.end, 1))
    return buffers


def _cut(rows: Rows, begin: int, end: int) -> Iterator[tuple[int, Rows]]:
    """Bytes ``[begin, end)`` of rows, counted within them: ``(from where, which)``, with whole rows together."""
    size_bytes = rows.size_bytes
    while begin < end:
        row, within = divmod(begin, size_bytes)
        whole = (end - begin) // size_bytes if not within else 0
        at = rows.begin + row * rows.stride_bytes + within
        taken = whole * size_bytes if whole else min(size_bytes - within, end - begin)
        yield begin, Rows(at, whole, size_bytes, rows.stride_bytes) if whole > 1 else Rows(at, 1, taken, taken)
        begin += taken


def _extents(places: list[Place]) -> list[tuple[int, Rows]]:
    """The places' bytes, those joined that are neighbours in the file and in the image."""
    extents: list[tuple[int, Rows]] = []
    at, begin, size_bytes = 0, 0, 0  # of the run that is still growing
    for _, _, rows, offset, place_bytes in places:
        whole = rows.number == 1
        if size_bytes and whole and rows.begin == begin + size_bytes and offset == at + size_bytes:
            size_bytes += place_bytes
            continue
        if size_bytes:
            extents.append((at, Rows(begin, 1, size_bytes, size_bytes)))
        at, begin, size_bytes = offset, rows.begin, place_bytes if whole else 0
        if not whole:
            extents.append((offset, rows))
    if size_bytes:
        extents.append((at, Rows(begin, 1, size_bytes, size_bytes)))
    return extents
