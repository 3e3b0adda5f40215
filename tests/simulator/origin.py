"""The simulated origin: objects in memory, replaced now and then, behind a network that fails."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cached.checksum import crc64nvme
from cached.errors import NotFoundError, ObjectChangedError, OriginProtocolError, OriginUnavailableError
from cached.origins.base import Abort, OriginChecksum, OriginObject, OriginSpec, ReadInto
from tests.simulator.faults import Faults

BUCKET = "s3://simulated"


@dataclass(slots=True)
class Stored:
    """An object as it is now."""

    content: bytes
    version: str
    vouched: bool


@dataclass(slots=True)
class Bucket:
    """All objects, and every content that each path ever had."""

    faults: Faults
    objects: dict[str, Stored] = field(default_factory=dict)
    ever: dict[str, list[bytes]] = field(default_factory=dict)
    served_bytes: dict[str, int] = field(default_factory=dict)
    versions: int = 0

    def put(self, path: str, content: bytes, *, vouched: bool) -> None:
        """Replaces the object: readers see the old one or the new one."""
        self.versions += 1
        self.objects[path] = Stored(content, f"v{self.versions}", vouched)
        if content not in self.ever.setdefault(path, []):
            self.ever[path].append(content)

    def open(self, spec: OriginSpec) -> SimOrigin:
        """The origin of a model: what lies below its URI."""
        return SimOrigin(self, spec.uri.removeprefix(f"{BUCKET}/"))

    def total_bytes(self, name: str) -> int:
        """Of a model."""
        return sum(len(stored.content) for path, stored in self.objects.items() if path.startswith(f"{name}/"))


class SimOrigin:
    """See Origin."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._prefix = f"{name}/"

    def prepare(self) -> None:
        """See Origin."""

    def list_objects(self) -> list[OriginObject]:
        """See Origin."""
        self._answer()
        paths = sorted(path for path in self._bucket.objects if path.startswith(self._prefix))
        if not paths:
            raise NotFoundError("there are no objects", ref=self._prefix)
        return [self._item(path, checksums=False) for path in paths]

    def stat(self, path: str) -> OriginObject:
        """See Origin."""
        self._answer()
        if self._prefix + path not in self._bucket.objects:
            raise NotFoundError("there is no such object", ref=path)
        return self._item(self._prefix + path, checksums=True)

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. What comes short leaves junk behind."""
        del abort
        self._answer()
        path, at = self._prefix + item.path, offset_bytes
        stored = self._bucket.objects.get(path)
        if stored is None:
            raise NotFoundError("the object is gone", ref=item.path)
        if stored.version != item.version:
            raise ObjectChangedError("the object changed", expected=item.version, found=stored.version)
        short = self._bucket.faults.strikes("origin_short")

        def read_into(view: memoryview) -> None:
            nonlocal at
            view[:] = bytes(len(view)) if short else stored.content[at : at + len(view)]
            at += len(view)

        yield read_into
        if short:
            raise OriginProtocolError("the body was shorter than it said", path=item.path)
        self._bucket.served_bytes[path] = self._bucket.served_bytes.get(path, 0) + length_bytes

    def close(self) -> None:
        """See Origin."""

    def _answer(self) -> None:
        if self._bucket.faults.strikes("origin_5xx"):
            raise OriginUnavailableError("503 Slow Down", cause="503")

    def _item(self, path: str, *, checksums: bool) -> OriginObject:
        stored = self._bucket.objects[path]
        known = (OriginChecksum("crc64nvme", f"{crc64nvme(stored.content):016x}"),) if stored.vouched else ()
        return OriginObject(
            path.removeprefix(self._prefix), len(stored.content), stored.version, known if checksums else ()
        )


def digest_of(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def random_content(rng: random.Random, chunk_bytes: int) -> bytes:
    """Up to a few chunks; empty files, single bytes and whole chunks are likelier than chance would have them."""
    size_bytes = rng.choice(
        (0, 1, chunk_bytes, 2 * chunk_bytes, *(rng.randrange(1, 4 * chunk_bytes) for _ in range(5)))
    )
    return rng.randbytes(size_bytes)
