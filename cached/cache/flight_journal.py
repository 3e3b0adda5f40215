"""The journal of a flight, which may fail: that costs only the resume after a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cached.cache.failures import Degraded
from cached.errors import CachedError
from cached.level import Level
from cached.levels.journal import IngestJournal, JournalChunk


class FlightJournal:
    """Loop only. Nothing is noted before ``open``, nor after a failure, which is told; none of it raises."""

    def __init__(self, degraded: Degraded) -> None:
        self._degraded = degraded
        self._journal: IngestJournal | None = None

    def open(self, path: Path, source_key: str, size_bytes: int) -> Mapping[int, JournalChunk]:
        """What an earlier try has noted of this very source and size; see ``IngestJournal.open``."""
        try:
            self._journal = IngestJournal.open(path, source_key=source_key, size_bytes=size_bytes)
        except CachedError as error:
            self._failed(error)
            return {}
        self._degraded.ended("journal")
        return self._journal.chunks

    def chunk(self, index: int, crc64: int, level: Level) -> None:
        """``level`` has this chunk, verified."""
        self._note(lambda journal: journal.chunk(index, crc64, level))

    def landed(self, digest: str) -> None:
        """The ingest became this blob."""
        self._note(lambda journal: journal.landed(digest))

    def close(self) -> None:
        """The file stays, for the next try. It may still be deleted."""
        if self._journal is not None:
            self._journal.close()

    def delete(self) -> None:
        """Nothing is left to be taken up again."""
        self._note(IngestJournal.delete)

    def _note(self, act: Callable[[IngestJournal], None]) -> None:
        if self._journal is not None:
            try:
                act(self._journal)
            except CachedError as error:
                self._failed(error)

    def _failed(self, error: CachedError) -> None:
        self._degraded.began("journal", error.message, error)
        self.close()
        self._journal = None
