"""What movers are asked to do and what they answer: plain values, JSON on a pipe. A mover knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec


@dataclass(frozen=True, slots=True)
class ListObjects:
    """List an origin. Answer: Listing."""

    origin: OriginSpec


@dataclass(frozen=True, slots=True)
class StatObjects:
    """Stat these objects (with checksums). Answer: Listing in the same order."""

    origin: OriginSpec
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Open an origin, so that its first range does not have to wait for that. Answer: an empty Listing."""

    origin: OriginSpec


@dataclass(frozen=True, slots=True)
class FindTensors:
    """Look for tensors by name in the head of a weight file, at the origin or in a local file. Answer: Found.

    ``patterns`` are those of ``cached_client.patterns``. ``listing``: the file is no weight file, but the index that
    says which of them has which tensor. ``limit_bytes``: only so much of the file's beginning may be read; 0: all.
    """

    patterns: tuple[str, ...]
    origin: OriginSpec | None = None
    item: OriginObject | None = None
    source: FileRef | None = None
    listing: bool = False
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Origin range → ``target`` at the same offset, checksummed after it landed. Answer: Moved.

    In memory the pages are allocated first (shortage is NoRoomError, never SIGBUS); a disk target is written through a
    private buffer of the mover's thread. ``expected_crc64``: what the caller compares the answer with; movers do not,
    but a chain goes on to its next link (see Chains).

    ``aside``: the range, a chunk at most, is read into a private buffer in any case, and written only if it has the
    expected checksum: what somebody has mapped changes to what it should be, or not at all.
    """

    origin: OriginSpec
    item: OriginObject
    offset_bytes: int
    length_bytes: int
    target: FileRef
    expected_crc64: int | None = None
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Hedge:
    """The same range once more, for a fetch that stalls. Answer: ARRIVED, then Moved.

    The bytes are read into a private buffer of the mover's thread. They go to the target after PROCEED and not before;
    with ABORT they never do.
    """

    fetch: Fetch


@dataclass(frozen=True, slots=True)
class Copy:
    """Local file → local file at the same offset (promote, demote, write-behind). Answer: Moved, of the bytes as read.

    With ``expected_crc64`` a difference raises IntegrityError and, for a disk target, nothing is written.
    """

    source: FileRef
    target: FileRef
    offset_bytes: int
    length_bytes: int
    expected_crc64: int | None = None


@dataclass(frozen=True, slots=True)
class Checksum:
    """CRC64-NVME of a range of a local file, nothing moved (verify, scrub, adopt). Answer: Moved."""

    source: FileRef
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Hash:
    """Feeds a range into the running whole-content SHA-256 ``key``; ranges of a key come in order, to one mover.

    ``offset_bytes == 0`` starts anew. With ``final`` the digest is in the answer and the state is dropped. A mover that
    does not know the key at this offset (it was restarted) raises MoverError; the caller starts again from 0. Answer:
    Hashed.
    """

    key: str
    source: FileRef
    offset_bytes: int
    length_bytes: int
    final: bool


@dataclass(frozen=True, slots=True)
class PartDigests:
    """Digests of consecutive parts of a local file with ``algorithm`` (see OriginChecksum). Answer: Digests.

    For composites, and for full-object checksums that are not CRC64-NVME or SHA-256 (one part then).
    """

    source: FileRef
    algorithm: str
    part_sizes_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Clear:
    """Zeroes a range of a segment of the pool, allocating its pages. Answer: Moved with crc64 0."""

    target: FileRef
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A local file → ``path`` below the origin, which must be writable. Answer: Listing of what is stored there now."""

    origin: OriginSpec
    source: FileRef
    path: str


@dataclass(frozen=True, slots=True)
class ReadTexts:
    """Small objects of an origin, whole. Answer: Texts in the same order.

    Of one that is larger than ``max_bytes``, is no UTF-8, or went away meanwhile: an empty text.
    """

    origin: OriginSpec
    items: tuple[OriginObject, ...]
    max_bytes: int


Job = (
    ListObjects | StatObjects | Prepare | FindTensors | Fetch | Hedge | Copy | Checksum | Hash | PartDigests | Clear
    | Upload | ReadTexts
)  # fmt: skip


class Word(StrEnum):
    """What is said of a job while a mover works on it."""

    ABORT = "abort"
    """To the mover: end a Fetch or Hedge at once, whatever it waits for. It is answered as ever."""
    PROCEED = "proceed"
    """To the mover: a Hedge may write."""
    ARRIVED = "arrived"
    """From the mover: a Hedge has its bytes."""


class Group(StrEnum):
    """Jobs that share threads of a mover, so that none waits behind jobs of another kind."""

    LOCAL = "local"
    ORIGIN = "origin"
    HEDGE = "hedge"


def group_of(job: Job) -> Group:
    """The group of a job."""
    if isinstance(job, Hedge):
        return Group.HEDGE
    if isinstance(job, FindTensors):
        return Group.LOCAL if job.origin is None else Group.ORIGIN
    at_origin = isinstance(job, Fetch | ListObjects | StatObjects | Prepare | Upload | ReadTexts)
    return Group.ORIGIN if at_origin else Group.LOCAL


@dataclass(frozen=True, slots=True)
class Threads:
    """How many jobs of each group a mover works on at the same time."""

    local: int
    origin: int
    hedge: int

    def of(self, group: Group) -> int:
        """Those of a group."""
        return {Group.LOCAL: self.local, Group.ORIGIN: self.origin, Group.HEDGE: self.hedge}[group]


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects of an origin."""

    items: tuple[OriginObject, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Tensors whose names some pattern matches, as columns, in the order of their bytes.

    ``paths``: of a listing, the file of each; of a weight file dtype, shape and bytes ``[begin, end)`` in it, and how
    long its head is. ``weights``: all files of a listing. ``unmatched``: numbers of the patterns that match nothing
    here, with the names that come nearest to each.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    unmatched: tuple[int, ...] = ()
    near: tuple[tuple[str, ...], ...] = ()
    head_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """A range was moved or read; ``busy_s`` is the thread's wall time, ``cpu_s`` its CPU time.

    ``origin``: which one a Fetch was served by, as Chains calls it; empty in a mover's own answer.
    """

    crc64: int
    length_bytes: int
    busy_s: float
    cpu_s: float
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Hashed:
    """``sha256`` is hex when the job was final, else empty."""

    sha256: str
    length_bytes: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Digests:
    """Hex digests, one a part."""

    values_hex: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """What small objects hold."""

    values: tuple[str, ...]


Result = Listing | Found | Moved | Hashed | Digests | Texts
