"""What is asked of a standalone pull, how far it is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from cached.cache.flight import BlobOrder
from cached.level import Level
from cached.manifest import FileEntry, Manifest
from cached.refs import Ref
from cached.seed import Thoroughness
from cached.standalone.arrival import Arrival


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pull. ``offline``: nothing is asked of the origin, and nothing is changed: only what is there counts."""

    ref: Ref
    source: str = ""
    verify: Thoroughness = Thoroughness.CHUNKS
    offline: bool = False
    force: bool = False


@dataclass(slots=True)
class Progress:
    """What a watcher may show at any time."""

    phase: str = "starting"
    name: str = ""
    total_bytes: int = 0
    kept_bytes: int = 0
    """Of files that were found whole in the folder."""
    arrivals: list[Arrival] = field(default_factory=list)

    @property
    def done_bytes(self) -> int:
        """Verified so far."""
        return self.kept_bytes + sum(arrival.done_bytes for arrival in self.arrivals)

    def bytes_from(self, level: Level) -> int:
        """What was verified by where it came from; L1: it was in place, from an interrupted pull."""
        return sum(arrival.bytes_from[level] for arrival in self.arrivals)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did. ``resumed_bytes``: of an earlier, interrupted one, or what was whole of damaged files."""

    manifest: Manifest
    origin_bytes: int
    kept_bytes: int
    resumed_bytes: int
    copied_bytes: int
    damaged_files: tuple[str, ...]
    removed_files: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class Plan:
    """``kept``: path → what is whole at its place. ``orders``: ingest id → what has to come."""

    kept: dict[str, FileEntry] = field(default_factory=dict)
    orders: dict[str, BlobOrder] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    """Path → ingest id, of files that have to come."""
    damaged: dict[str, frozenset[int]] = field(default_factory=dict)
    """Path → chunks, of files at their place."""

    @property
    def copied(self) -> dict[str, str]:
        """Path → ingest id, of files that are the same as another one that has to come."""
        last = {key: path for path, key in self.paths.items()}
        return {path: key for path, key in self.paths.items() if last[key] != path}
