"""The loads of one attached model to devices: which path each takes, what it falls back to, and its report."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from cached_client.errors import CacheError, InvalidRequestError
from cached_client.gpu.device import PinningError
from cached_client.gpu.options import DeviceReport, Geometry, GpuOptions
from cached_client.gpu.registered import RegisteredFiles
from cached_client.gpu.ring import RINGS
from cached_client.gpu.topology import Topology, topology_of
from cached_client.gpu.upload import Upload, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from cached_client._arrivals import Arrivals, Deadline
    from cached_client._index import TensorIndex
    from cached_client.gpu.device import Device, Pinned
    from cached_client.gpu.ring import Ring

_log = logging.getLogger("cached_client")
_told: set[str] = set()


def parse_device(device: str | torch.device | None) -> torch.device | None:
    """What the caller named; None for the CPU, where tensors are views. Raises InvalidRequestError."""
    if device is None:
        return None
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequestError(
            f"torch knows no device {device!r}", hint="for example 'cuda:0' or 'cpu'", value=device
        ) from error
    return None if parsed.type == "cpu" else parsed


def open_device(device: torch.device) -> tuple[Device, Topology]:
    """The GPU, and where it sits. Raises DeviceError."""
    from cached_client.gpu.cuda import CudaDevice

    opened = CudaDevice(device)
    return opened, topology_of(opened.pci_address)


class DeviceLoads:
    """Copies an attached model to a device, as often as is asked for. Any thread may use it; loads may overlap."""

    def __init__(
        self,
        arrivals: Arrivals,
        index: TensorIndex,
        fetch: Callable[[Sequence[int]], Iterable[tuple[int, int]]],
        *,
        may_register: bool = True,
    ) -> None:
        """``fetch`` gives new descriptors of files by index.

        ``may_register``: not of files with holes, which would get pages that nobody has room for.
        """
        self._arrivals = arrivals
        self._index = index
        self._fetch = fetch
        self._may_register = may_register
        self._lock = threading.Lock()
        self._loads = 0
        self._using = 0
        self._registered: dict[str, RegisteredFiles] = {}
        self._closed = False
        self.report: DeviceReport | None = None

    def tensors(
        self,
        device: torch.device,
        wanted: Wanted,
        options: GpuOptions,
        deadline: Deadline,
        plain: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields ``(name, tensor)`` as they land, and leaves its `report`.

        ``plain`` does the same without a ring: it is used for devices that are no CUDA device, and where no memory can
        be pinned. Raises DeviceError, and what `Upload` does.
        """
        if device.type != "cuda":
            yield from self._plainly(device, plain, ())
            return
        opened, topology = open_device(device)
        if not options.bind:
            topology = Topology(pcie_generation=topology.pcie_generation)
        processors = topology.processors or os.sched_getaffinity(0)
        geometry = Geometry.choose(options, topology.pcie_generation, len(processors))
        fallbacks: list[str] = []
        try:
            ring = RINGS.take(opened, geometry, topology.processors)
        except PinningError as error:
            self._note(fallbacks, opened.name, error.message)
            yield from self._plainly(device, plain, tuple(fallbacks))
            return
        if ring.without:
            self._note(fallbacks, opened.name, ring.without)
        yield from self._through(ring, opened, topology, wanted, options, deadline, fallbacks)

    @property
    def busy(self) -> bool:
        """Whether a load is under way."""
        with self._lock:
            return self._using > 0

    def close(self) -> None:
        """Unpins what was registered, when no load uses it any more. Idempotent."""
        with self._lock:
            self._closed = True
            idle = not self._using
        if idle:
            self._unregister()

    def _through(
        self,
        ring: Ring,
        device: Device,
        topology: Topology,
        wanted: Wanted,
        options: GpuOptions,
        deadline: Deadline,
        fallbacks: list[str],
    ) -> Iterator[tuple[str, torch.Tensor]]:
        with self._lock:
            self._using += 1
        upload: Upload | None = None
        registered: Mapping[int, Pinned] = {}
        try:
            registered = self._files_of(device, options, fallbacks)
            upload = Upload(self._arrivals, self._index, device, ring, wanted, deadline, registered)
            yield from upload.tensors()
            self._arrivals.mark("device_complete")
            with self._lock:
                self._loads += 1
        finally:
            RINGS.give_back(device, ring, usable=upload is None or upload.usable)
            if upload is not None:
                path = "registered" if registered else "ring"
                self.report = _report(path, device, ring, topology, upload, fallbacks)
            self._unused()

    def _plainly(
        self, device: torch.device, plain: Callable[[], Iterator[tuple[str, torch.Tensor]]], fallbacks: tuple[str, ...]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        began_s, copied_bytes, copies = time.monotonic(), 0, 0
        for name, tensor in plain():
            copies, copied_bytes = copies + 1, copied_bytes + tensor.numel() * tensor.element_size()
            self._arrivals.mark("device_first")
            yield name, tensor
            del tensor
        self._arrivals.mark("device_complete")
        seconds = time.monotonic() - began_s
        self.report = DeviceReport(str(device), "plain", fallbacks, copied_bytes, copies, seconds)

    def _files_of(self, device: Device, options: GpuOptions, fallbacks: list[str]) -> Mapping[int, Pinned]:
        """The registered mappings, if they are wanted by now and can be had."""
        if options.register_after is None or self._arrivals.report is None or not self._may_register:
            return {}
        with self._lock:
            if self._loads < options.register_after or self._closed:
                return {}
            if device.name not in self._registered:
                files = RegisteredFiles(device)
                try:
                    infos = self._arrivals.infos()
                    sizes_bytes = {index: infos[index].size_bytes for index in self._index.weight_files() or ()}
                    files.register(sizes_bytes, self._fetch)
                except CacheError as error:  # also: the daemon is gone, and gives no descriptors
                    self._note(fallbacks, device.name, f"the mapping was not registered: {error.message}")
                    return {}
                self._registered[device.name] = files
            return self._registered[device.name].files

    def _unused(self) -> None:
        with self._lock:
            self._using -= 1
            last = self._closed and not self._using
        if last:
            self._unregister()

    def _unregister(self) -> None:
        with self._lock:
            registered, self._registered = list(self._registered.values()), {}
        for files in registered:
            files.release()

    @staticmethod
    def _note(fallbacks: list[str], device: str, what: str) -> None:
        """Something slower is done instead: the report says so each time, the log once."""
        fallbacks.append(what)
        if what not in _told:
            _told.add(what)
            _log.warning("copies to %s are slower than they could be: %s", device, what)


def _report(
    path: str, device: Device, ring: Ring, topology: Topology, upload: Upload, fallbacks: list[str]
) -> DeviceReport:
    return DeviceReport(
        device=device.name,
        path=path,
        fallbacks=tuple(fallbacks),
        copied_bytes=upload.pump.copied_bytes,
        copies=upload.pump.copies,
        seconds=upload.seconds,
        arrival_wait_s=upload.arrival_wait_s,
        ring_wait_s=upload.pump.ring_wait_s,
        threads=ring.geometry.threads,
        slot_bytes=ring.geometry.slot_bytes,
        steps=ring.geometry.steps,
        numa_node=topology.numa_node,
        pcie_generation=topology.pcie_generation,
    )
