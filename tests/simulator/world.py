"""What outlives a daemon: its folders, the origin, the workers with what they map, and all that was ever true."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cached.types import AttachedFile, ByteRange
from tests.simulator.faults import Faults
from tests.simulator.kernel import SimKernel
from tests.simulator.origin import Bucket, digest_of, random_content
from tests.simulator.scale import CHUNK_BYTES

NAMES = ("m0", "m1", "m2", "m3")
_FILES = ("config.json", "shared.safetensors", "a.safetensors", "b.safetensors")
NAMED = ("blob", "ingest")
"""Kinds of segments that are what their name says; the others are free, or going to be."""


class Violation(AssertionError):  # noqa: N818 - what was promised does not hold
    """The engine and the reference model disagree."""


@dataclass(eq=False)
class Holder:
    """A worker: what it was told is ready, read at once and again later, against all that was ever true."""

    name: str
    revision: str
    token: str
    files: tuple[AttachedFile, ...]
    candidates: dict[int, list[bytes]]
    fds: dict[int, int] = field(default_factory=dict)
    ready: list[ByteRange] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    """Of the files that it was told are whole."""
    complete: bool = False
    tainted: bool = False
    """A bit was flipped in L1 while it mapped this: what it reads may be wrong."""
    evicted: bool = False
    """An operator had it evicted before it took up its lease again: that may be on the same content, brought anew."""
    lost: bool = False
    """Its lease could not be taken up again: it goes on with what it maps."""

    @property
    def is_whole(self) -> bool:
        """It maps all files."""
        return len(self.fds) == len(self.files)

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """The files that it was told are whole."""
        return tuple(ByteRange(index, 0, self.files[index].size_bytes) for index in sorted(self.fds))

    def saw(self, item: ByteRange) -> None:
        """A range was announced: its bytes, and all announced before, are those of one version of the file."""
        self.ready.append(item)
        self._compare(item)

    def look_again(self) -> None:
        """Nothing of it may ever change."""
        for item in self.ready:
            self._compare(item)

    def completed(self, indices: list[int]) -> None:
        """These files are whole and checked."""
        self.complete = True
        for index in indices:
            file = self.files[index]
            self.saw(ByteRange(index, 0, file.size_bytes))
            content = os.pread(self.fds[index], file.size_bytes + 1, 0)
            self.digests[index] = digest_of(content)
            if file.sha256 and not self.tainted and self.digests[index] != file.sha256:
                raise Violation(f"{self.name}/{file.path} is not the blob {file.sha256[:12]} that it is said to be")

    def close(self) -> None:
        """It is gone, and so are its mappings."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def _compare(self, item: ByteRange) -> None:
        if self.tainted:
            return
        file = self.files[item.file_index]
        begin, end = item.offset_bytes, item.offset_bytes + item.length_bytes
        found = os.pread(self.fds[item.file_index], item.length_bytes, begin)
        left = [one for one in self.candidates[item.file_index] if one[begin:end] == found]
        if not left:
            raise Violation(
                f"bytes {begin} to {end} of {self.name}/{file.path}, announced as ready, are of no version "
                "that the origin ever had, or mix two"
            )
        self.candidates[item.file_index] = left


def _is(digest: str, content: bytes) -> bool:
    return digest_of(content) == digest


class World:
    """One history's. ``rng`` decides what is done; faults and moments have generators of their own."""

    def __init__(self, folder: Path, rng: random.Random, faults: Faults) -> None:
        self.folder = folder
        self.rng = rng
        self.faults = faults
        self.bucket = Bucket(faults)
        self.durable: dict[str, str] = {}
        self.holders: list[Holder] = []
        self.damaged = False
        """Bits were flipped: what nobody can mend may be refused now."""
        self.pinned: dict[str, bool] = {}
        """What operators were told of models; none of one that is not known for sure, as when a kill came first."""
        self.l1, self.l2, self.state = folder / "l1", folder / "l2", folder / "state"
        self.kernel = SimKernel(self.l2, faults, random.Random(rng.random()))
        self.l1.mkdir(parents=True)
        self._shared = random_content(rng, CHUNK_BYTES)
        for name in NAMES:
            for file in _FILES:
                self.replace(name, file)

    def replace(self, name: str, file: str = "") -> None:
        """New content at the origin."""
        file = file or self.rng.choice(_FILES)
        content = random_content(self.rng, CHUNK_BYTES)
        if file == "config.json":
            content = b'{"n": %d}' % self.rng.randrange(10**6)
        elif file == "shared.safetensors" and self.rng.random() < 0.8:
            content = self._shared
        self.bucket.put(f"{name}/{file}", content, vouched=self.rng.random() < 0.5)

    def holder(self, name: str, revision: str, token: str, files: tuple[AttachedFile, ...]) -> Holder:
        """A new worker."""
        candidates = {
            file.index: [one for one in self.bucket.ever.get(f"{name}/{file.path}", []) if len(one) == file.size_bytes]
            for file in files
        }
        holder = Holder(name, revision, token, files, candidates)
        self.holders.append(holder)
        return holder

    def release(self, holder: Holder) -> None:
        """A worker ends."""
        holder.look_again()
        holder.close()
        self.holders.remove(holder)

    def flip_bit(self, level_folder: Path) -> bool:
        """Damages a blob somewhere."""
        blobs = [path for path in self._blob_paths(level_folder) if path.stat().st_size]
        if not blobs:
            return False
        path = self.rng.choice(blobs)
        with path.open("r+b") as file:
            file.seek(self.rng.randrange(path.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ (1 << self.rng.randrange(8))]))
        self.damaged = True
        return True

    def blobs(self, level_folder: Path) -> dict[str, int]:
        """Digest → bytes of all blobs there."""
        return {path.name.rpartition(".")[2]: path.stat().st_size for path in self._blob_paths(level_folder)}

    def named_inodes(self) -> set[int]:
        """Of segments of L1 that are what their name says, whole or not; the others are free, or going to be."""
        return {entry.inode() for entry in os.scandir(self.l1) if entry.name.split(".")[2] in NAMED}

    def _blob_paths(self, level_folder: Path) -> list[Path]:
        pattern = "cached.*.blob.*" if level_folder == self.l1 else "blobs/*/*"
        return sorted(level_folder.glob(pattern))

    def check_blobs(self) -> None:
        """Whatever has a blob's name is that blob, at any moment, unless bits were flipped."""
        wrong = self._wrong_blobs()
        if wrong and not self.damaged:
            raise Violation(f"{wrong} are not what their names say")

    def _wrong_blobs(self) -> list[str]:
        paths = [*self._blob_paths(self.l1), *self._blob_paths(self.l2)]
        return [path.name for path in paths if not _is(path.name.rpartition(".")[2], path.read_bytes())]

    def committed(self) -> set[str]:
        """Blobs of L2 that nothing that may happen now takes away: durable, and of a revision that is recorded."""
        recorded = "".join(text for key, text in self.durable.items() if key.startswith("manifest"))
        return {
            digest
            for digest in self.blobs(self.l2)
            if digest in recorded
            and self.kernel.has_durable(self.l2 / "blobs" / digest[:2] / digest, partial(_is, digest))
        }

    def cut_power(self) -> None:
        """Memory is gone, and so are the workers; disks have what was synced, and some of what was not."""
        for holder in list(self.holders):
            self.release(holder)
        for path in self.l1.iterdir():
            path.unlink()
        self.kernel.cut_power()
        if "fsync_lies" not in self.faults.hit:
            self.check_blobs()
        elif self._wrong_blobs():
            self.damaged = True
        journals = self.state / "journals"
        for path in sorted(journals.iterdir()) if journals.is_dir() else ():
            os.truncate(path, self.rng.randrange(path.stat().st_size + 1))

    def remove(self) -> None:
        """Everything, for good."""
        for holder in self.holders:
            holder.close()
        shutil.rmtree(self.folder, ignore_errors=True)
