"""The ring's device on CUDA, through torch's public interface and the driver's. torch is imported by `open_device`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
from typing import TYPE_CHECKING, Any

from cached_client.errors import DeviceError
from cached_client.gpu.device import PinningError
from cached_client.gpu.options import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt
    import torch

    from cached_client.gpu.device import Event, Pinned

_log = logging.getLogger("cached_client")

_PORTABLE = 0x01  # cudaHostRegisterPortable: for every device of the process
_READ_ONLY = 0x08  # cudaHostRegisterReadOnly
_READ_ONLY_SUPPORTED = 113  # cudaDevAttrHostRegisterReadOnlySupported
_PIECE_BYTES = 1 << 30
"""Memory is registered in pieces: kernels 6.11 to 6.13 pin no more than 2 GB at once, drivers less than 512 GiB."""


class CudaPinned:
    """Host memory that is registered with CUDA, or was allocated pinned. ``pieces`` are the registered addresses."""

    def __init__(self, array: npt.NDArray[np.uint8], keeps: object, pieces: list[int]) -> None:
        self.array: npt.NDArray[np.uint8] = array
        self._keeps: object | None = keeps
        self._pieces = pieces

    def release(self) -> None:
        """Unpins. Idempotent."""
        _unregister(self._pieces)
        self._keeps = None


class CudaEvent:
    """An event whose waiter sleeps rather than spins."""

    def __init__(self, event: torch.cuda.Event, device: str) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """As `Event`."""
        with _translated(self._device, "a copy"):
            self._event.synchronize()


class CudaDevice:
    """One GPU, with a stream of its own for the copies of one load.

    Memory is allocated on the stream that was current in the thread which made this object: there the caller is going
    to use the tensors, and there the allocator may reuse the memory when the tensors are gone. Copies are ordered after
    whatever that stream was given before, and the load waits for each copy's event before it hands out a tensor.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises DeviceError if torch cannot use it."""
        import torch

        self._cuda: Any = torch.cuda
        self.device: torch.device = _existing(device)
        self.name: str = str(self.device)
        with _translated(self.name, "opening it"):
            self._consumer = self._cuda.current_stream(self.device)
            self._stream = self._cuda.Stream(self.device)

    @property
    def pci_address(self) -> str | None:
        """``0000:3b:00.0``, if the driver says."""
        return _driver_pci_address(self.device.index)

    def pin(self, size_bytes: int) -> tuple[Pinned, str]:
        """Pages of its own, registered once: ``pin_memory=True`` would round up to a power of two."""
        import numpy as np
        import torch

        # Shared, so that a fork leaves the pages that the device reads with this process.
        memory = mmap.mmap(-1, size_bytes)
        array = np.frombuffer(memory, np.uint8)
        array[::PAGE_BYTES] = 0  # the pages come from the NUMA node of the thread that touches them first
        try:
            return CudaPinned(array, memory, self._register(array, _PORTABLE)), ""
        except PinningError as refusal:
            try:
                pinned = torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self._clear_error()
                raise PinningError(
                    f"no pinned memory for {self.name}: {refusal.message}; then: {_first_line(error)}",
                    hint="raise the limit of locked memory (ulimit -l, LimitMEMLOCK=), or give GpuOptions fewer bytes",
                    device=self.name,
                    cause=_first_line(error),
                ) from error
            return CudaPinned(pinned.numpy(), pinned, []), f"{refusal.message}; torch's pinned memory is used"

    def register(self, memory: npt.NDArray[np.uint8]) -> Pinned:
        """Only where the device says that it can: elsewhere a read-only mapping cannot be registered."""
        if _driver_attribute(self.device.index, _READ_ONLY_SUPPORTED) != 1:
            raise PinningError(
                f"{self.name} cannot register read-only memory (device attribute {_READ_ONLY_SUPPORTED})",
                hint="leave register_after at None: the ring is used",
                device=self.name,
            )
        alias = _alias(memory)
        return CudaPinned(alias, memory, self._register(alias, _PORTABLE | _READ_ONLY))

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """As `Device`: from torch's caching allocator, on the caller's stream."""
        import torch

        with _translated(self.name, f"allocating {size_bytes} bytes"):
            with torch.cuda.stream(self._consumer):
                buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
            self._stream.wait_stream(self._consumer)
        return buffer

    def copy(self, source: Pinned, begin: int, target: torch.Tensor) -> None:
        """As `Device`."""
        import torch

        done, size_bytes = 0, target.numel()
        with _translated(self.name, f"copying {size_bytes} bytes"), torch.cuda.stream(self._stream):
            while done < size_bytes:
                at = begin + done
                # No copy crosses from one registered piece into the next.
                part = min(size_bytes - done, _PIECE_BYTES - at % _PIECE_BYTES)
                host = torch.from_numpy(source.array[at : at + part])
                target[done : done + part].copy_(host, non_blocking=True)
                done += part

    def record(self) -> Event:
        """As `Device`."""
        with _translated(self.name, "recording an event"):
            event = self._cuda.Event(blocking=True)
            event.record(self._stream)
        return CudaEvent(event, self.name)

    def drain(self) -> None:
        """As `Device`."""
        with _translated(self.name, "the copies in flight"):
            self._stream.synchronize()

    def _register(self, array: npt.NDArray[np.uint8], flags: int) -> list[int]:
        address = _address(array)
        pieces: list[int] = []
        with self._cuda.device(self.device):
            runtime = self._cuda.cudart()
            for begin in range(0, array.nbytes, _PIECE_BYTES):
                size_bytes = min(_PIECE_BYTES, array.nbytes - begin)
                code = int(runtime.cudaHostRegister(address + begin, size_bytes, flags))
                if code:
                    _unregister(pieces)
                    self._clear_error()
                    raise PinningError(
                        f"CUDA refused to register {size_bytes} bytes of host memory (error {code})",
                        hint="another path is taken; see the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
                        device=self.name,
                        cause=code,
                    )
                pieces.append(address + begin)
        return pieces

    def _clear_error(self) -> None:
        """Takes the error of a refused call away, which the next kernel launch of anybody would be blamed for.

        Raises DeviceError if it does not go: then the process's CUDA context is broken.
        """
        import torch

        with contextlib.suppress(RuntimeError):
            self._probe(torch)
        with _translated(self.name, "using it after a refused call"):
            self._probe(torch)

    def _probe(self, torch: Any) -> None:
        with torch.cuda.stream(self._stream):
            torch.zeros(1, device=self.device).add_(1)
        self._stream.synchronize()


def _existing(device: torch.device) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            f"{device} cannot be used: torch {torch.__version__} finds no GPU",
            hint="see `nvidia-smi` and CUDA_VISIBLE_DEVICES; torch must be a build for CUDA (torch.version.cuda)",
            device=device,
        )
    named: Any = device.index
    index: int = torch.cuda.current_device() if named is None else named
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"there is no {device}: this process sees {count} GPUs",
            hint="they are numbered from 0; see CUDA_VISIBLE_DEVICES",
            device=device,
        )
    return torch.device("cuda", index)


def _unregister(pieces: list[int]) -> None:
    """Unregisters and forgets the addresses."""
    import torch

    cuda: Any = torch.cuda
    while pieces:
        address = pieces.pop()
        try:
            code = int(cuda.cudart().cudaHostUnregister(address))
        except RuntimeError as error:
            code = -1
            _log.warning("unregistering host memory failed: %s", _first_line(error))
        if code > 0:
            _log.warning("CUDA refused to unregister host memory at %#x (error %d)", address, code)


def _alias(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The same bytes, with numpy's word that they may be written: torch warns of others. Nobody writes them."""
    import numpy as np

    bytes_there: Any = (ctypes.c_uint8 * memory.nbytes).from_address(_address(memory))
    return np.frombuffer(memoryview(bytes_there), np.uint8)


def _address(array: npt.NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


@contextlib.contextmanager
def _translated(device: str, what: str) -> Iterator[None]:
    """Torch's errors as typed ones. After most CUDA errors the process can use no GPU any more: the hint says so."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} has no room: {what} failed: {_first_line(error)}",
            hint="free memory on it (`nvidia-smi` shows who holds it), load fewer tensors or a slice, or use `stream`",
            device=device,
            cause=_first_line(error),
        ) from error
    except RuntimeError as error:
        raise DeviceError(
            f"{device} failed: {what}: {_first_line(error)}",
            hint="a CUDA error usually stays until the process ends: restart this worker; see `dmesg` for Xid messages",
            device=device,
            cause=_first_line(error),
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _driver() -> Any:
    """libcuda, which the runtime has loaded already; None where there is none (ROCm)."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def _driver_attribute(index: int, attribute: int) -> int | None:
    driver, handle, value = _driver(), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), index):
        return None
    return None if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) else value.value


def _driver_pci_address(index: int) -> str | None:
    driver, handle, text = _driver(), ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), index):
        return None
    if driver.cuDeviceGetPCIBusId(text, len(text), handle):
        return None
    domain, _, rest = text.value.decode("ascii").lower().partition(":")
    return f"{domain[-4:]:>04}:{rest}"  # sysfs has four digits of domain, some drivers say eight
