"""Which bytes of a model a selection means: reads the heads of its weight files, wherever they are nearest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cached.cache.asking import asked
from cached.cache.load import Chosen, LoadFile
from cached.cache.loader import Loader
from cached.cache.registry import Presence
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, MoverError, NotFoundError
from cached.levels.base import FileRef
from cached.signals import run_all
from cached.transfer.heads import INDEX_PATH, matched, nearest, weight_files
from cached.transfer.jobs import Checksum, FindTensors, Found, Moved
from cached.types import Selected, SelectedTensor, Selection
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_AT_A_TIME = 16
"""Heads read beside each other."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a local file that may be read: ``limit_bytes`` from its start, 0: all."""

    source: FileRef
    limit_bytes: int


class Chooser:
    """Loop only. Moves nothing to a level, and changes nothing."""

    def __init__(self, services: Services, loader: Loader) -> None:
        self._services = services
        self._loader = loader

    async def choose(self, name: str, files: Sequence[LoadFile], selection: Selection) -> Chosen:
        """What a selection matches.

        Raises NotFoundError for a pattern that matches nothing, BadFormatError, and what the origin raises.
        """
        by_path = {file.path: index for index, file in enumerate(files)}
        paths, missing = matched(selection.files, list(by_path))
        if missing:
            raise _no_match(name, "file", selection.files[missing[0]], nearest(selection.files[missing[0]], by_path))
        whole = tuple(by_path[path] for path in paths)
        if not selection.tensors:
            return _chosen(files, (), whole, {})
        looked = await self._look(name, files, by_path, selection.tensors)
        tensors = tuple(tensor for index in sorted(looked) for tensor in _tensors(index, looked[index]))
        heads = {index: found.head_bytes for index, found in looked.items() if found.names}
        if INDEX_PATH in by_path:
            index = by_path[INDEX_PATH]
            heads[index] = files[index].size_bytes
        return _chosen(files, tensors, whole, heads)

    async def _look(
        self, name: str, files: Sequence[LoadFile], by_path: dict[str, int], patterns: tuple[str, ...]
    ) -> dict[int, Found]:
        """What the weight files that may have matching tensors say, by file index."""
        weights, hopeful = weight_files(by_path, ()), None
        if INDEX_PATH in by_path and weights:
            listed = await self._find(files[by_path[INDEX_PATH]], FindTensors(patterns, listing=True))
            weights = weight_files(by_path, listed.weights)
            # An index that does not know all that is asked for may be wrong: the files themselves decide.
            hopeful = set(listed.paths) & set(weights) if not listed.unmatched else None
        indices = [by_path[path] for path in weights if hopeful is None or path in hopeful]
        slots = asyncio.Semaphore(_AT_A_TIME)

        looked: dict[int, Found] = {}

        async def look(index: int) -> None:
            async with slots:
                looked[index] = await self._find(files[index], FindTensors(patterns))

        await run_all(*(look(index) for index in indices))
        self._check_all_match(name, patterns, looked.values())
        return looked

    def _check_all_match(self, name: str, patterns: tuple[str, ...], looked: Iterable[Found]) -> None:
        answers = list(looked)
        unmatched = set(range(len(patterns))).intersection(*(found.unmatched for found in answers))
        if not unmatched:
            return
        number = min(unmatched)
        near = {like for found in answers for like in found.near[found.unmatched.index(number)]}
        raise _no_match(name, "tensor", patterns[number], nearest(patterns[number], near))

    async def _find(self, file: LoadFile, job: FindTensors) -> Found:
        """The answer of the nearest place that has the head, proven; else of the origin."""
        for place in await self._places(file):
            try:
                return await self._ask(replace(job, source=place.source, limit_bytes=place.limit_bytes))
            except CachedError as error:
                if error.reason == "BAD_FORMAT" or file.order is None or file.order.origin is None:
                    raise
        if file.order is None or file.order.origin is None:
            raise IntegrityError(
                f"the head of {file.path} is not to be had here, and no origin is known",
                hint="pull the model again with --source URI",
                path=file.path,
            )
        return await self._ask(replace(job, origin=file.order.origin.spec, item=file.order.origin.item))

    async def _ask(self, job: FindTensors) -> Found:
        answer = await asked(self._services, job)
        if not isinstance(answer, Found):
            raise MoverError("a mover answered a search for tensors with something else")
        return answer

    async def _places(self, file: LoadFile) -> list[_Place]:
        """Where the beginning of a file is on this host, nearest first."""
        storage, registry = self._services.storage, self._services.registry
        digest = file.digest
        blob = registry.blobs.get(digest)
        if blob is not None and blob.l1 is Presence.CONFIRMED:
            return [_Place(storage.l1.blob(digest), 0)]
        places = []
        arriving = self._loader.verified_chunks(file.order.ingest_id) if file.order is not None else None
        if arriving is not None and 0 in arriving[1]:
            target, chunks = arriving
            places.append(_Place(target, _beginning_bytes(file.size_bytes, chunks)))
        disk = storage.disk_copy(digest, file.size_bytes) if blob is not None else None
        if disk is not None and blob is not None and file.size_bytes:
            length_bytes = chunk_length(file.size_bytes, 0)
            found = await self._services.runner.run(Checksum(disk, 0, length_bytes))
            if isinstance(found, Moved) and found.crc64 == blob.record.crc64[0]:
                places.append(_Place(disk, length_bytes))
        return places


def _tensors(index: int, found: Found) -> list[SelectedTensor]:
    columns = zip(found.names, found.dtypes, found.shapes, found.begins, found.ends, strict=True)
    return [SelectedTensor(index, *row) for row in columns]


def _beginning_bytes(size_bytes: int, chunks: frozenset[int]) -> int:
    """Bytes from the start of a file without a hole."""
    first_hole = next(index for index in range(len(chunks) + 1) if index not in chunks)
    return min(size_bytes, first_hole * CHUNK_BYTES)


def chunks_of(begin: int, end: int) -> range:
    """The chunks that hold bytes ``[begin, end)``."""
    return range(begin // CHUNK_BYTES, chunk_count(end) if end > begin else begin // CHUNK_BYTES)


def _chosen(
    files: Sequence[LoadFile], tensors: tuple[SelectedTensor, ...], whole: tuple[int, ...], heads: dict[int, int]
) -> Chosen:
    chunks: dict[int, set[int]] = {}
    for tensor in tensors:
        chunks.setdefault(tensor.file_index, set()).update(chunks_of(tensor.begin, tensor.end))
    for index in whole:
        chunks[index] = set(range(chunk_count(files[index].size_bytes)))
    first = {index: set(found) for index, found in chunks.items()}
    for index, head_bytes in heads.items():
        first.setdefault(index, set()).update(chunks_of(0, head_bytes))
    return Chosen(
        selected=Selected(tensors, whole),
        chunks={index: frozenset(found) for index, found in chunks.items()},
        first={index: frozenset(found) for index, found in first.items()},
        size_bytes=sum(files[index].size_bytes for index in whole)
        + sum(tensor.end - tensor.begin for tensor in tensors if tensor.file_index not in whole),
    )


def _no_match(name: str, what: str, pattern: str, near: Sequence[str]) -> NotFoundError:
    likely = f"; near it: {', '.join(near)}" if near else ""
    return NotFoundError(
        f"no {what} of {name} matches {pattern!r}{likely}",
        hint="patterns are those of a shell, and case counts: model.layers.0.* has all tensors of a layer",
        ref=name,
        pattern=pattern,
        near=", ".join(near),
    )
