"""The filling side of the ring to a GPU, without a GPU: what one host feeds it with. Beside it, plain copies.

The device here takes no time, so the ring is never waited for. Every run maps the files afresh, as a worker that has
just attached does: half of the time is page faults, unless the shared memory is in huge pages.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.cpu import measured
from bench.peers.fingerprint import fingerprint, fingerprint_of_files
from bench.results import Role, Sample
from cached_client._arrivals import Arrivals, Deadline
from cached_client._index import TensorIndex
from cached_client._version import __version__
from cached_client.gpu.options import Geometry
from cached_client.gpu.ring import Ring
from cached_client.gpu.upload import Upload, Wanted
from cached_client.segment import MappedFile
from cached_client.types import FileInfo, LoadReport


class NoPinned:
    """Ordinary memory."""

    def __init__(self, size_bytes: int) -> None:
        self.array = np.zeros(size_bytes, np.uint8)

    def release(self) -> None:
        """Nothing to do."""


class NoDevice:
    """Takes every copy in no time; ``keeps``: makes it, to see that what the ring brings is the checkpoint."""

    name = "no device"

    def __init__(self, *, keeps: bool = False) -> None:
        self._keeps = keeps
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def pin(self, size_bytes: int) -> tuple[NoPinned, str]:
        return NoPinned(size_bytes), ""

    def register(self, memory: np.ndarray) -> NoPinned:
        raise NotImplementedError

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Not touched, so it costs no memory unless it is kept."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, source: NoPinned, begin: int, target: torch.Tensor) -> None:
        if self._keeps:
            target.copy_(torch.from_numpy(source.array[begin : begin + target.numel()]))

    def record(self) -> NoDevice:
        return self

    def wait(self) -> None:
        """Everything is done."""

    def drain(self) -> None:
        """Likewise."""


class RingFill:
    """The ring as it is, its slots of ``slot_bytes``, with no device behind it."""

    role = Role.OURS
    version = __version__

    def __init__(self, name: str, title: str, geometry: Geometry, files: Sequence[Path]) -> None:
        self.name, self.title = name, title
        self._files = files
        self._ring = Ring(NoDevice(), geometry, None)
        self._checked = False

    def prepare(self) -> None:
        """The first time, sees that the right bytes come."""
        if not self._checked:
            tensors, _ = self._load(NoDevice(keeps=True))
            views = ((name, memoryview(tensor.view(-1).view(torch.uint8).numpy())) for name, tensor in tensors.items())
            assert fingerprint(views, full=True) == fingerprint_of_files(self._files, full=True)
            self._checked = True

    def run(self) -> Sample:
        """From files that were just mapped."""
        with measured() as span:
            tensors, _kept = self._load(NoDevice())  # a worker keeps its mappings
        return Sample(span.seconds, sum(tensor.nbytes for tensor in tensors.values()), span.cpu_s)

    def close(self) -> None:
        """Gives the ring back."""
        self._ring.release()

    def _load(self, device: NoDevice) -> tuple[dict[str, torch.Tensor], Arrivals]:
        arrivals = Arrivals()
        infos = [FileInfo(path.name, path.stat().st_size, "") for path in self._files]
        arrivals.opened(infos, [MappedFile(os.open(p, os.O_RDONLY), p.stat().st_size) for p in self._files])
        arrivals.completed(LoadReport("l1", 0, 0, 0, 0.0, "first-seen"))
        upload = Upload(arrivals, TensorIndex(arrivals), device, self._ring, Wanted(), Deadline(None))
        return dict(upload.tensors()), arrivals


class PlainCopy:
    """The same threads copy the same bytes into as many slots, and nothing else: the limit.

    ``how``: ``mapped`` copies from a fresh mapping, ``faulted`` from one whose pages were touched before the clock
    started, ``read`` reads the files into the slots.
    """

    version = ""

    def __init__(self, name: str, title: str, how: str, geometry: Geometry, files: Sequence[Path], role: Role) -> None:
        self.name, self.title, self.role = name, title, role
        self._how = how
        self._geometry = geometry
        self._files = files
        self._slots = np.zeros((geometry.threads, geometry.steps, geometry.slot_bytes), np.uint8)

    def prepare(self) -> None:
        """Nothing is kept from round to round."""

    def run(self) -> Sample:
        descriptors = [os.open(path, os.O_RDONLY) for path in self._files]
        sizes = [path.stat().st_size for path in self._files]
        try:
            # An mmap is not kept open by its descriptor, but a file that is read is.
            sources = [self._map(*pair) for pair in zip(descriptors, sizes, strict=True)]
            with measured() as span:
                threads = [
                    threading.Thread(target=self._copy, args=(number, sources, descriptors, sizes))
                    for number in range(self._geometry.threads)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return Sample(span.seconds, sum(sizes), span.cpu_s)

    def close(self) -> None:
        """Nothing to close."""

    def _map(self, descriptor: int, size_bytes: int) -> np.ndarray:
        mapped = np.frombuffer(mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_COPY), np.uint8)
        if self._how == "faulted":
            mapped[:: mmap.PAGESIZE].max()
        return mapped

    def _copy(self, number: int, sources: list[np.ndarray], descriptors: list[int], sizes: list[int]) -> None:
        threads, slot_bytes, turn = self._geometry.threads, self._geometry.slot_bytes, 0
        for source, descriptor, size_bytes in zip(sources, descriptors, sizes, strict=True):
            for begin in range(number * slot_bytes, size_bytes, threads * slot_bytes):
                part_bytes = min(slot_bytes, size_bytes - begin)
                slot = self._slots[number][turn % self._geometry.steps][:part_bytes]
                turn += 1
                if self._how == "read":
                    assert os.preadv(descriptor, [memoryview(slot)], begin) == part_bytes
                else:
                    np.copyto(slot, source[begin : begin + part_bytes])
