"""What can be tuned about a copy to a GPU, and what a load tells about its own. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from cached_client.errors import InvalidRequestError

MIB = 1024 * 1024
PAGE_BYTES = 4096

_THREADS_BY_PCIE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 12}
"""Threads that fill a link of that generation with 16 lanes: 25 GB/s for PCIe 4, 55 for PCIe 5. One of them copies 9 to
10 GB/s out of a mapping whose pages of 4 KiB it has to fault in, and 20 out of one that is in place."""

_THREADS_UNKNOWN = 4
_STEP_BYTES = 16 * MIB
"""A copy to the device of at least this size fills the link."""


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """How `Model.stream`, `state_dict` and `load_into` copy to a GPU. The defaults suit one load of a whole model.

    Attributes:
        threads: threads that copy into pinned memory. None: by the GPU's PCIe generation, at most the processors
            that this process may use.
        slot_bytes: what each of them copies at a time. None: 2 to 4 MiB, so that all of them together make a step of
            about 16 MiB, which is one copy to the device.
        steps: how many steps the ring has. It takes ``steps * threads * slot_bytes`` of pinned memory.
        bind: run these threads on the processors of the GPU's NUMA node, where that is known.
        ahead_bytes: `stream` keeps at most about this much on the device of what was not yet taken from it.
        buffer_bytes: `stream` puts tensors into flat buffers of this size, each freed with the last of its tensors.
            `state_dict` makes one buffer for each file.
        register_after: after this many loads of the same `Model` object, pin its mapping itself and copy from there,
            where the platform allows that. Pinning costs 0.04 to 0.1 s for each GB, so it pays only for a model that
            is loaded again and again. None: never.
    """

    threads: int | None = None
    slot_bytes: int | None = None
    steps: int = 3
    bind: bool = True
    ahead_bytes: int = 1024 * MIB
    buffer_bytes: int = 256 * MIB
    register_after: int | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequestError for a value that makes no sense."""
        least = {"threads": 1, "slot_bytes": PAGE_BYTES, "steps": 2, "ahead_bytes": 1, "buffer_bytes": 1}
        for name, smallest in {**least, "register_after": 0}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InvalidRequestError(f"{name} is {value}, at least {smallest} is needed", value=value)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a ring."""

    threads: int
    slot_bytes: int
    steps: int

    @property
    def step_bytes(self) -> int:
        """What is copied to the device at once."""
        return self.threads * self.slot_bytes

    @property
    def size_bytes(self) -> int:
        """The pinned memory."""
        return self.steps * self.step_bytes

    @classmethod
    def choose(cls, options: GpuOptions, pcie_generation: int | None, processors: int) -> Geometry:
        """What ``options`` say; what they leave open by the link's generation and the processors there are."""
        wanted = _THREADS_BY_PCIE.get(pcie_generation or 0, _THREADS_UNKNOWN)
        threads = options.threads or max(1, min(wanted, processors))
        slot_bytes = options.slot_bytes or min(4 * MIB, max(2 * MIB, -(-_STEP_BYTES // threads)))
        return cls(threads, -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES, options.steps)


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """How the last load of a model reached its device.

    Attributes:
        device: where to, e.g. ``cuda:0``.
        path: ``registered`` (from the mapping itself), ``ring`` (through pinned memory), ``plain`` (one ``to()`` for
            each tensor).
        fallbacks: why a faster path was not taken, and what else was done without; empty if all went as it should.
        copied_bytes: bytes that crossed to the device, with the gaps between tensors.
        copies: how many copies that were.
        seconds: from its begin to its last copy.
        arrival_wait_s: how much of that the copies waited for bytes to arrive.
        ring_wait_s: how much they waited for a free step of the ring: the link, or the filling threads, were busy.
        threads, slot_bytes, steps: the ring; 0 without one.
        numa_node: the node its threads were bound to; None: they were not bound.
        pcie_generation: of the GPU's link, as far as it is known.
    """

    device: str
    path: str
    fallbacks: tuple[str, ...] = ()
    copied_bytes: int = 0
    copies: int = 0
    seconds: float = 0.0
    arrival_wait_s: float = 0.0
    ring_wait_s: float = 0.0
    threads: int = 0
    slot_bytes: int = 0
    steps: int = 0
    numa_node: int | None = None
    pcie_generation: int | None = None
