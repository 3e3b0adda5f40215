"""Whether a file is what it was verified to be: every byte is read again."""

from __future__ import annotations

from collections.abc import Callable

from cached.errors import LevelError, MoverError
from cached.levels.base import FileRef
from cached.manifest import BlobRecord
from cached.signals import run_all
from cached.standalone.engine import Tools
from cached.transfer.jobs import Checksum, Digests, Moved, PartDigests

_WIDTH = 8
"""Chunks of a file that are read at a time: what keeps a drive busy."""


async def confirm(
    tools: Tools, ref: FileRef, record: BlobRecord, on_bytes: Callable[[int], None], *, with_sha256: bool = False
) -> frozenset[int]:
    """The chunks of a file that are not what ``record`` says, or cannot be read; all of them if the SHA-256 differs.

    ``on_bytes`` is called with counts of further bytes that are as they should be. Loop only; raises MoverError.
    """
    bad: set[int] = set()
    pending = iter(range(len(record.crc64)))

    async def work() -> None:
        for index in pending:
            offset_bytes, length_bytes, expected = record.chunk(index)
            try:
                answer = await tools.runner.run(Checksum(ref, offset_bytes, length_bytes))
            except LevelError:
                bad.add(index)
                continue
            if not isinstance(answer, Moved):
                raise MoverError("a mover answered a checksum with something else")
            if answer.crc64 == expected:
                on_bytes(length_bytes)
            else:
                bad.add(index)

    await run_all(*(work() for _ in range(_WIDTH)))
    if with_sha256 and not bad and record.size_bytes:
        digests = await tools.runner.run(PartDigests(ref, "sha256", (record.size_bytes,)))
        if not isinstance(digests, Digests):
            raise MoverError("a mover answered a digest with something else")
        if digests.values_hex != (record.digest,):
            bad.update(range(len(record.crc64)))
    return frozenset(bad)
