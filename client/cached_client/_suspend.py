"""A model set aside around a snapshot of the process: its lease and mappings go, and come back to the same content.

What stays meanwhile are ranges of addresses without memory, so that tensors, arrays and views are what they were once
the same bytes are mapped there again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client._lease import Lease
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import ANSWER_S
from cached_client.errors import CacheError, ChangedError, IntegrityError, TimeoutExpiredError
from cached_client.segment import changed_pages, place, withdraw

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Mapping

    from cached_client._arrivals import Arrivals, Deadline
    from cached_client._index import TensorIndex
    from cached_client.connection import Connection
    from cached_client.segment import MappedFile
    from cached_client.types import DamagedRange, FileInfo

_log = logging.getLogger("cached_client")

_POLL_S = 0.05
_DISCONNECT_S = 5.0
_DISCONNECT_POLL_S = 0.002
_PROBE_S = 1.0
_PAGE_NAMES = 5

Content = dict[str, tuple[int, str]]
"""Size and SHA-256 of each file, by path."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """What is kept of a model: what to ask for, what it must be, and where it was mapped.

    ``files`` are its mappings by path; ``regions`` those of them, and of earlier attaches that tensors still use.
    """

    request: pb.AttachRequest
    content: Content
    files: Mapping[str, MappedFile]
    regions: tuple[tuple[str, mmap.mmap], ...]


def content_of(connection: Connection, request: pb.AttachRequest, arrivals: Arrivals, deadline: Deadline) -> Content:
    """What a complete model consists of. Waits for digests that are computed behind the arrival.

    The digest of a file that is not whole on this host stays empty: its revision names it. So do digests of a selection
    that were not known when it was attached. Raises TimeoutExpiredError, the model's own error, and as
    `Connection.call`.
    """
    content = {info.path: (info.size_bytes, info.sha256) for info in arrivals.infos()}
    if request.HasField("selection") and not request.selection.rest_follows:
        return content  # the daemon has no description of a model of which it has a part
    while not all(digest for _, digest in content.values()):
        left_s = deadline.left_s()
        timeout_s = ANSWER_S if left_s is None else max(left_s, _POLL_S)
        described = connection.call(connection.stub.Describe, pb.DescribeRequest(ref=request.ref), timeout_s=timeout_s)
        content |= {file.path: (content[file.path][0], file.sha256) for file in described.files if file.path in content}
        if not described.path:
            break
        if deadline.left_s() == 0 and not all(digest for _, digest in content.values()):
            raise TimeoutExpiredError(
                f"the digests of {request.ref} were not known within {deadline.timeout_s:g} s",
                hint="the daemon still hashes what the origin vouched for; `cached show` lists what is known",
                what="digests",
                timeout_s=deadline.timeout_s,
            )
        time.sleep(_POLL_S)
        arrivals.check()
    return content


def prepare(connection: Connection, lease: Lease, arrivals: Arrivals, deadline: Deadline) -> Suspended:
    """What will be needed to bring the model back; nothing is changed yet."""
    request = lease.request()
    content = content_of(connection, request, arrivals, deadline)
    files = {info.path: file for info, file in zip(arrivals.infos(), arrivals.mapped(), strict=True)}
    current = ((path, file.range) for path, file in files.items())
    regions = [(path, region) for path, region in current if region is not None]
    return Suspended(request, content, files, (*regions, *lease.replaced()))


def check_unchanged(suspended: Suspended, index: TensorIndex, deadline: Deadline) -> None:
    """Raises ChangedError if this process wrote to the model; CacheError if the kernel does not tell."""
    for path, region in suspended.regions:
        pages = list(changed_pages(region))
        if not pages:
            continue
        named = list(_tensors_in(path, pages, suspended, index, deadline))
        told = ", ".join(named[:_PAGE_NAMES]) + (", …" if len(named) > _PAGE_NAMES else "")
        raise ChangedError(
            f"this process wrote to {path} of {suspended.request.ref}, and a suspension would lose that: "
            f"{len(pages)} pages{f', of {told}' if told else ''}",
            hint="give the changed tensors memory of their own (clone), or pass discard_changes=True",
            path=path,
            offset_bytes=pages[0],
            tensors=told,
        )


def _tensors_in(
    path: str, pages: list[int], suspended: Suspended, index: TensorIndex, deadline: Deadline
) -> Iterator[str]:
    order = list(suspended.files)
    with suppress(CacheError):  # files without tensors
        for name, (file_index, info) in index.tensors(deadline).items():
            following = bisect_left(pages, info.begin - PAGESIZE + 1)
            if order[file_index] == path and following < len(pages) and pages[following] < info.end:
                yield name


def set_aside(suspended: Suspended) -> None:
    """Takes the files out of their addresses."""
    for _, region in suspended.regions:
        withdraw(region)


def bring_back(
    connection: Connection,
    suspended: Suspended,
    arrivals: Arrivals,
    on_damaged: Callable[[DamagedRange], None] | None,
    deadline: Deadline,
) -> Lease:
    """A new lease on the same content, mapped where it was. All or nothing: what it raises leaves no lease.

    ``arrivals`` are the lease's, new; whoever ends them ends this.

    Raises IntegrityError if the content is another, and whatever an attach of that revision does.
    """
    lease = Lease(connection, suspended.request, arrivals, on_damaged)
    lease.start()
    try:
        arrivals.wait_for(lambda: arrivals.report, deadline, f"the model {suspended.request.ref}")
        _compare(suspended, content_of(connection, suspended.request, arrivals, deadline))
        _map_again(suspended, lease, arrivals)
    except BaseException:
        lease.stop()
        arrivals.close()
        raise
    return lease


def _compare(suspended: Suspended, found: Content) -> None:
    expected = suspended.content
    for path in sorted({*expected, *found}):
        if not _is_same(expected.get(path), found.get(path)):
            raise IntegrityError(
                f"{path} of {suspended.request.ref} is not what it was before the model was suspended",
                hint="load the model anew: its tensors cannot come back",
                path=path,
                expected=_told(expected.get(path)),
                found=_told(found.get(path)),
            )


def _is_same(first: tuple[int, str] | None, second: tuple[int, str] | None) -> bool:
    if first is None or second is None:
        return False
    return first[0] == second[0] and (first[1] == second[1] or not (first[1] and second[1]))


def _told(content: tuple[int, str] | None) -> str:
    return "no such file" if content is None else f"{content[0]} bytes, SHA-256 {content[1]}"


def disconnect(connection: Connection) -> None:
    """Closes the connection, and waits until its socket is closed: gRPC does that a little later.

    Another connection of the process to the same daemon is somebody else's; after a moment that is logged.
    """
    bound = _bound_name(connection.path)
    ours = {link for link, fd in _sockets() if _peer(fd) == bound}
    connection.close()
    end_s = time.monotonic() + _DISCONNECT_S
    while ours & {link for link, _ in _sockets()}:
        if time.monotonic() > end_s:
            _log.warning("this process still has a connection to %s: another cache to suspend?", connection.path)
            return
        time.sleep(_DISCONNECT_POLL_S)


def _sockets() -> Iterator[tuple[str, int]]:
    """This process's sockets: ``socket:[inode]`` and descriptor."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                yield link, int(name)


def _bound_name(path: Path) -> Path:
    """The name that the daemon gave the socket at ``path``: another one through a link or in another mount.

    ``path`` itself if nobody answers there.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        probe.connect(os.fspath(path))
        return _peer(probe.fileno()) or path
    return path


def _peer(fd: int) -> Path | None:
    """The Unix socket that a socket is connected to, by the name that its owner gave it."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        name = connection.getpeername()
        if isinstance(name, str) and name:
            # gRPC writes the path that it was given with more slashes before it.
            return Path("/" + name.lstrip("/") if name.startswith("/") else name)
    return None


def _map_again(suspended: Suspended, lease: Lease, arrivals: Arrivals) -> None:
    infos, fresh = arrivals.infos(), arrivals.mapped()
    # More than one range for a path only where a restart of the daemon had replaced a mapping.
    ranges = {index: [at for path, at in suspended.regions if path == info.path] for index, info in enumerate(infos)}
    try:
        for index, fd in lease.descriptors([index for index, regions in ranges.items() if regions]):
            try:
                for region in ranges[index]:
                    _place(region, fd, infos[index], fresh[index])
            finally:
                os.close(fd)
    except BaseException:
        set_aside(suspended)
        raise
    for info, file in zip(infos, fresh, strict=True):
        suspended.files[info.path].identity = file.identity
    arrivals.adopt([suspended.files[info.path] for info in infos])


def _place(region: mmap.mmap, fd: int, info: FileInfo, fresh: MappedFile) -> None:
    if place(region, os.dup(fd), info.size_bytes) != fresh.identity:
        raise IntegrityError(
            f"the segment of {info.path} was exchanged while it was mapped again",
            hint="resume again",
            path=info.path,
        )
