"""What content is checked against when it first comes: the catalog's SHA-256, else the origin's own checksum.

And what is there already, before it counts for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cached.cache.registry import Presence
from cached.cache.services import Services
from cached.checksum import combine_crc64nvme, compose_parts
from cached.errors import IntegrityError, MoverError
from cached.level import Level
from cached.levels.base import FileRef
from cached.manifest import BlobRecord
from cached.origins.base import OriginChecksum
from cached.refs import artifact_digest
from cached.transfer.fill import Fill, Runner, Sources
from cached.transfer.jobs import Digests, PartDigests
from cached.units import chunk_length

if TYPE_CHECKING:
    from cached.cache.flight import BlobOrder

_STRENGTH = ("sha256", "crc64nvme", "sha1", "git-sha1", "crc32c", "crc32")


def strongest(checksums: tuple[OriginChecksum, ...]) -> OriginChecksum | None:
    """The one to check against: whole-object before composite, then by algorithm; none if there is none we know."""
    known = [item for item in checksums if item.algorithm in _STRENGTH]
    return min(known, key=lambda item: (bool(item.part_sizes_bytes), _STRENGTH.index(item.algorithm)), default=None)


async def confirm_origin_checksum(runner: Runner, order: BlobOrder, fill: Fill) -> None:
    """Returns when the content is what the origin vouches for, if it does. All chunks must be in.

    Raises IntegrityError naming the file, the check, what was expected and what was found.
    """
    checksum = strongest(order.origin.item.checksums) if order.origin else None
    if checksum is None:
        return
    if checksum.algorithm == "crc64nvme" and not checksum.part_sizes_bytes:
        parts = ((fill.crc64[index], chunk_length(fill.size_bytes, index)) for index in range(fill.chunk_count))
        found = f"{combine_crc64nvme(parts):016x}"
    else:
        found = await _digest_again(runner, checksum, fill)
    if found != checksum.value_hex:
        raise _mismatch(order, f"origin-{checksum.algorithm}", checksum.value_hex, found)


async def _digest_again(runner: Runner, checksum: OriginChecksum, fill: Fill) -> str:
    sizes = checksum.part_sizes_bytes or (fill.size_bytes,)
    answer = await runner.run(PartDigests(fill.target, checksum.algorithm, sizes))
    if not isinstance(answer, Digests):
        raise MoverError("a mover answered a digest with something else")
    if not checksum.part_sizes_bytes:
        return answer.values_hex[0]
    return compose_parts(checksum.algorithm, answer.values_hex)


def confirm_sha256(order: BlobOrder, found: str) -> None:
    """Raises IntegrityError unless the content is what the catalog says."""
    if found != order.sha256:
        raise _mismatch(order, "catalog-sha256", order.sha256, found)


async def confirm_there(services: Services, level: Level, record: BlobRecord, arrived: FileRef) -> None:
    """What just arrived, verified, is about to be given up for a blob of the same content that is there already.

    Where nobody knows that one to be right (it waits to be confirmed, or is damaged), each of its chunks is read, and
    mended from ``arrived``. Raises what movers do.
    """
    blob = services.registry.blobs.get(record.digest)
    if blob is None or not blob.at(level):
        return
    if blob.l1 is Presence.CONFIRMED if level is Level.L1 else record.digest not in services.registry.quarantined:
        return
    expected = dict(enumerate(record.crc64))
    fill = Fill(
        key=f"mend {record.digest}", runner=services.runner, clock=services.clock,
        target=services.storage.level(level).blob(record.digest),
        sources=Sources(in_place=frozenset(expected), disk=arrived, expected=expected), retry=services.retry, width=1,
    )  # fmt: skip
    for index in expected:
        await fill.mend(index)


def name_in_memory(services: Services, ingest_id: str, record: BlobRecord, on_blob: Callable[[str, str], None]) -> None:
    """What L1 kept of an earlier pull becomes the blob that just landed in L2, if all of it was verified there.

    Workers may map it, and the journal that says so goes with the load to L2. It is confirmed before anybody gets it.
    """
    storage, registry = services.storage, services.registry
    if not storage.kept_bytes(Level.L1, ingest_id) or registry.blobs[record.digest].at(Level.L1):
        return  # as nearly always: the journal is read for the others alone
    is_verified = len(services.journalled(ingest_id, Level.L1)) == len(record.crc64)
    if is_verified and storage.commit_kept(ingest_id, record, services.moved_segment):
        registry.found(record.digest, Level.L1)
        on_blob(ingest_id, record.digest)


def _mismatch(order: BlobOrder, check: str, expected: str, found: str) -> IntegrityError:
    if artifact_digest(order.name):
        return IntegrityError(
            f"{order.path} of {order.name} is not what its name says; nothing was committed",
            hint="somebody wrote something else there: look who may write to the destination, and remove that object",
            name=order.name, path=order.path, check="name-sha256", expected=expected, found=found,
        )  # fmt: skip
    where = "the catalog" if check == "catalog-sha256" else "the origin's own checksum"
    return IntegrityError(
        f"{order.path} of {order.name} is not what {where} says; nothing was committed",
        hint=(
            "if the object was replaced on purpose, correct the catalog's sha256; otherwise upload the right file again"
            if check == "catalog-sha256"
            else "the object or the way to it is damaged: pull again, and upload the file again if it stays so"
        ),
        name=order.name,
        path=order.path,
        check=check,
        expected=expected,
        found=found,
    )
