"""The promises that hold whenever nothing is under way, checked through what anybody can see of a running daemon.

``check_at_rest`` after every test of the whole, ``check_stopped`` after an orderly stop. They look at RPC answers, at
/dev/shm, at L2, at the state folder and at /proc; they know nothing of the daemon's inside.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for

_PAGE_BYTES = 4096


def check_at_rest(
    daemon: DaemonProcess, *, leases: int | None = 0, kept_ingests: bool = False, content: bool = True
) -> None:
    """Waits until nothing is under way, and asserts the invariants.

    ``leases``: how many must be held (None: any). ``kept_ingests``: an interrupted pull may have left some to resume.
    ``content``: read every byte of both levels again.
    """
    problems: list[str] = []

    def settled() -> bool:
        problems[:] = _problems(daemon, leases, kept_ingests=kept_ingests)
        return not problems

    try:
        wait_for(settled, "rest")
    except AssertionError:
        raise AssertionError("the invariants do not hold at rest:\n" + "\n".join(problems)) from None
    if content:
        wrong = wrong_blobs(daemon)
        assert not wrong, f"these blobs are not what their names say: {wrong}"


def wrong_blobs(daemon: DaemonProcess) -> list[str]:
    """Blobs of both levels whose bytes are not those of their names; the daemon need not run."""
    return [str(path) for path, digest in _blobs(daemon) if not _is(digest, path)]


def check_stopped(daemon: DaemonProcess, pid: int) -> None:
    """After SIGTERM of ``pid``: no process, no socket, and no segment that is not a blob or an ingest to be resumed."""
    assert not daemon.is_running
    assert not daemon.socket.exists()
    assert not daemon.descriptor_socket.exists()
    assert not _session(pid), "processes were left behind"
    left = {path.name for path in daemon.segments() if _kind(path) not in {"blob", "ingest"}}
    assert not left, f"segments were left behind: {left}"


def _problems(daemon: DaemonProcess, leases: int | None, *, kept_ingests: bool) -> list[str]:
    try:
        return list(_look(daemon, leases, kept_ingests=kept_ingests))
    except (FileNotFoundError, ProcessLookupError) as error:
        return [f"something went away while it was looked at: {error}"]


def _look(daemon: DaemonProcess, leases: int | None, *, kept_ingests: bool) -> Iterator[str]:
    with daemon.stub() as stub:
        stats = stub.Stats(pb.StatsRequest())
        details = []
        for model in stub.List(pb.ListRequest()).models:
            try:
                details.append(stub.Describe(pb.DescribeRequest(ref=model.name)))
                details += [
                    stub.Describe(pb.DescribeRequest(ref=f"{model.name}@{revision}"))
                    for revision in details[-1].revisions
                    if revision != model.revision
                ]
            except grpc.RpcError as error:
                yield f"{model.name} cannot be described: {error}"
    if stats.active_load_count:
        yield f"{stats.active_load_count} loads are under way"
    if leases is not None and stats.lease_count != leases:
        yield f"{stats.lease_count} leases are held, not {leases}"
    yield from _level_problems(daemon, stats, details, kept_ingests=kept_ingests)
    yield from _view_problems(daemon, details)
    yield from _process_problems(daemon, stats)
    journals = sorted(path.name for path in (daemon.state_dir / "journals").iterdir())
    if journals and not kept_ingests:
        yield f"journals are left: {journals}"


def _level_problems(daemon: DaemonProcess, stats: Any, details: list[Any], *, kept_ingests: bool) -> Iterator[str]:
    """Invariants 2 and 4: what is counted is what is there, and all of it belongs to a revision."""
    for level in stats.levels:
        name = pb.Level.Name(level.level)
        in_l1 = level.level == pb.LEVEL_L1
        there = _l1(daemon) if in_l1 else _l2(daemon)
        total = sum(size for sizes in there.values() for size in sizes.values())
        if level.reserved_bytes:
            yield f"{name}: {level.reserved_bytes} bytes are reserved at rest"
        if level.used_bytes > level.capacity_bytes:
            yield f"{name}: {level.used_bytes} used of {level.capacity_bytes}"
        holes = sum(_holes(daemon).values()) if in_l1 else 0
        if not total - holes <= level.used_bytes <= total:
            yield f"{name}: {level.used_bytes} bytes are counted, {total} with {holes} in holes are there: {there}"
        if there["ingest"] and not kept_ingests:
            yield f"{name}: ingests are left: {there['ingest']}"
        for kind, counted in (("withdrawn", level.withdrawn_bytes), ("pool", level.pool_bytes)):
            sparse = sum(_holes(daemon, kind).values()) if in_l1 else 0
            if not sum(there[kind].values()) - sparse <= counted <= sum(there[kind].values()):
                yield f"{name}: {counted} {kind} bytes are counted, there are {there[kind]}"
        if there["withdrawn"] and not stats.lease_count:  # workers may still map them
            yield f"{name}: withdrawn segments are left: {there['withdrawn']}"
        files = [file for detail in details for file in detail.files]
        owned = {file.sha256: file.size_bytes for file in files if (file.in_l1 if in_l1 else file.in_l2)}
        if owned != there["blob"] and not kept_ingests:
            yield f"{name}: models have {owned}, there are {there['blob']}"
        if len(there["blob"]) != level.blob_count:
            yield f"{name}: {level.blob_count} blobs are counted, there are {len(there['blob'])}"
        for detail in details:
            counted = detail.summary.l1_bytes if in_l1 else detail.summary.l2_bytes
            mine = {file.sha256: file.size_bytes for file in detail.files if file.sha256 in there["blob"]}
            parts = sum(there["ingest"].values()) if in_l1 else 0  # of a model of which a part is here
            if not sum(mine.values()) <= counted <= sum(mine.values()) + parts:
                yield f"{name}: {detail.summary.name} is said to have {counted} bytes, {sum(mine.values())} are there"


def _view_problems(daemon: DaemonProcess, details: list[Any]) -> Iterator[str]:
    """The directory view shows whole revisions only, and every link leads to a file of the right length."""
    shown = {path.name for path in (daemon.models_dir / ".views").glob("*") if any(path.iterdir())}
    for detail in details:
        if not detail.path:
            continue
        shown.discard(Path(detail.path).resolve().name)
        for file in detail.files:
            link = Path(detail.path, file.path)
            if not link.exists() or link.stat().st_size != file.size_bytes:
                yield f"{link} leads to nothing, or to something else"
    if shown:
        yield f"the directory view shows what is not there: {shown}"


def _process_problems(daemon: DaemonProcess, stats: Any) -> Iterator[str]:
    """Invariant 4: no process of ours without an owner, no descriptor or mapping of a segment or blob that stays."""
    children = _children(daemon.pid)
    zombies = [pid for pid in children if _stat(pid)[:1] == ["Z"]]
    if zombies:
        yield f"dead movers were not waited for: {zombies}"
    if len(children) - len(zombies) > stats.mover_count:
        yield f"{len(children)} movers run, {stats.mover_count} are counted"
    for pid in [daemon.pid, *children]:
        held = _held(pid, daemon)
        if held:
            yield f"process {pid} still holds {held}"


def _blobs(daemon: DaemonProcess) -> Iterator[tuple[Path, str]]:
    for path in daemon.segments():
        if _kind(path) == "blob":
            yield path, path.name.split(".")[3]
    for root in daemon.l2_dirs:
        for path in root.glob("blobs/*/*"):
            yield path, path.name


def _is(digest: str, path: Path) -> bool:
    """Or it left the level since it was listed, as policies have it."""
    try:
        return _sha256(path) == digest
    except FileNotFoundError:
        return True


def _l1(daemon: DaemonProcess) -> dict[str, dict[str, int]]:
    """Kind → id → bytes."""
    found: dict[str, dict[str, int]] = {kind: {} for kind in ("blob", "ingest", "withdrawn", "pool")}
    for path in daemon.segments():
        if path.is_file() and not path.is_symlink() and _kind(path) in found:
            found[_kind(path)][path.name.split(".", 3)[3]] = path.stat().st_size
    return found


def _holes(daemon: DaemonProcess, *kinds: str) -> dict[str, int]:
    """Segments that have not all of their pages: parts of blobs, and what was interrupted. Name → bytes in holes.

    Such a segment may count for its length, if all of it is to come, and never for less than its pages.
    """
    found = {}
    for path in daemon.segments():
        if path.is_file() and _kind(path) in (kinds or ("ingest", "withdrawn")):
            status = path.stat()
            pages_bytes = -(-status.st_size // _PAGE_BYTES) * _PAGE_BYTES
            found[path.name] = min(status.st_size, max(0, pages_bytes - status.st_blocks * 512))
    return found


def _l2(daemon: DaemonProcess) -> dict[str, dict[str, int]]:
    blobs = [path for root in daemon.l2_dirs for path in root.glob("blobs/*/*")]
    ingests = [path for root in daemon.l2_dirs for path in root.glob("ingests/*/data")]
    return {
        "blob": {path.name: path.stat().st_size for path in blobs},
        "ingest": {path.parent.name: path.stat().st_size for path in ingests},
        "withdrawn": {},
        "pool": {},
    }


def _kind(path: Path) -> str:
    parts = path.name.split(".")
    return parts[2] if len(parts) == 4 else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session, ...; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _held(pid: int, daemon: DaemonProcess) -> Counter[str]:
    """Segments and L2 files that a process has open or mapped."""
    prefix = _prefix(daemon)
    held: Counter[str] = Counter()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = _link(descriptor)
            if prefix in target or any(f"{root}/" in target for root in daemon.l2_dirs):
                held[target] += 1
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if prefix in line:
                held[line.split(maxsplit=5)[5]] += 1
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended meanwhile
    return held


def _session(leader: int) -> list[int]:
    """Processes of the session that the daemon led."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _stat(pid)[3:4] == [str(leader)]]


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _prefix(daemon: DaemonProcess) -> str:
    from cached.cache.build import instance_of

    return f"cached.{instance_of(str(daemon.state_dir))}."
