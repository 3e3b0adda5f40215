"""Every way in which something fails: one kind for each reason of ``cached.errors``. Values only.

What belongs to a kind is told here once: who has to act, which events and alerts tell of it, and which part of the
daemon is degraded by it. Its gRPC status is in ``cached.rpc.errors``, its exit code in ``cached.cli.failures``, its
paragraph in docs/operations.md. The reference has all of it in one table, and a test that nothing is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Whose(StrEnum):
    """Who can do something about it. What is the caller's affair is logged as information, the rest as a warning."""

    CALLER = "caller"
    SETTINGS = "settings"
    ORIGIN = "origin"
    HOST = "host"
    DAEMON = "daemon"


@dataclass(frozen=True, slots=True)
class FailureKind:
    """``events``: the kinds that tell of it, the most usual first; ``alerts``: which fire when it goes on.

    ``hint``: what to do, where the error itself does not know better.
    """

    reason: str
    whose: Whose
    hint: str
    events: tuple[str, ...] = ("rpc.refused",)
    alerts: tuple[str, ...] = ()


_LOADS = ("load.failed", "rpc.refused")

KINDS: tuple[FailureKind, ...] = (
    FailureKind(
        "INTERNAL",
        Whose.DAEMON,
        "report it with the traceback in the daemon's log: journalctl -u cached",
        ("internal.error", *_LOADS),
        ("CachedInternalErrors", "CachedPullsFailing"),
    ),
    FailureKind(
        "INVALID_REQUEST",
        Whose.CALLER,
        "correct what was asked for: cached COMMAND --help",
        ("rpc.refused", "descriptors.refused"),
    ),
    FailureKind(
        "INVALID_CONFIG",
        Whose.SETTINGS,
        "see cached config show, and cached catalog validate FILE",
        ("config.refused", "catalog.refused", "tls.refused", *_LOADS),
        ("CachedConfigRejected", "CachedCatalogRejected", "CachedPullsFailing"),
    ),
    FailureKind(
        "NOT_FOUND",
        Whose.CALLER,
        "see what there is: cached ls",
        ("rpc.refused", "load.failed"),
        ("CachedPullsFailing",),
    ),
    FailureKind(
        "NO_SOURCE",
        Whose.CALLER,
        "put the model into the catalog, or pull it with --source URI",
        ("rpc.refused", "load.failed"),
        ("CachedPullsFailing",),
    ),
    FailureKind("BAD_FORMAT", Whose.ORIGIN, "look at the file at its origin", _LOADS, ("CachedPullsFailing",)),
    FailureKind(
        "NO_ROOM",
        Whose.HOST,
        "see what holds the room: cached stats, cached ps",
        ("load.failed", "l2.skipped", "degraded.began", "rpc.refused"),
        ("CachedNoRoom",),
    ),
    FailureKind("IN_USE", Whose.CALLER, "see who holds it: cached ps"),
    FailureKind(
        "INTEGRITY",
        Whose.ORIGIN,
        "compare the object at its origin with what the catalog says",
        ("damage.found", "origin.blamed", *_LOADS),
        ("CachedChecksumFailures", "CachedOriginContentWrong"),
    ),
    FailureKind(
        "QUARANTINED",
        Whose.HOST,
        "bring its origin back, then: cached verify --repair",
        ("degraded.began", *_LOADS),
        ("CachedQuarantined",),
    ),
    FailureKind(
        "ORIGIN_FAILED",
        Whose.ORIGIN,
        "see cached doctor, and what the origin's own log says",
        ("load.failed", "artifact.upload_failed", "origin.skipped", "rpc.refused"),
        ("CachedOriginUnreachable",),
    ),
    FailureKind(
        "ORIGIN_UNAVAILABLE",
        Whose.ORIGIN,
        "see whether the origin can be reached from this host: cached doctor",
        ("load.failed", "artifact.upload_failed", "origin.skipped", "rpc.refused"),
        ("CachedOriginUnreachable",),
    ),
    FailureKind(
        "ORIGIN_DENIED",
        Whose.ORIGIN,
        "give the daemon's user credentials that allow it: cached doctor",
        ("load.failed", "artifact.upload_failed", "origin.skipped", "rpc.refused"),
        ("CachedOriginDenied",),
    ),
    FailureKind(
        "ORIGIN_PROTOCOL",
        Whose.ORIGIN,
        "look at what answers between this host and the origin: cached doctor",
        ("load.failed", "origin.skipped", "rpc.refused"),
        ("CachedOriginUnreachable",),
    ),
    FailureKind(
        "OBJECT_CHANGED",
        Whose.ORIGIN,
        "pull again when nobody writes to the source any more",
        _LOADS,
        ("CachedPullsFailing",),
    ),
    FailureKind(
        "LEVEL_FAILED",
        Whose.HOST,
        "look at the disk or the mount: dmesg, df -h, cached health",
        ("degraded.began", "l2.write_failed", "background.failed", *_LOADS),
        ("CachedL2Broken", "CachedDegraded", "CachedPullsFailing"),
    ),
    FailureKind(
        "MOVER_FAILED",
        Whose.HOST,
        "see why movers die: journalctl -u cached | grep mover, and dmesg",
        ("mover.died", *_LOADS),
        ("CachedMoverRestarts", "CachedPullsFailing"),
    ),
    FailureKind(
        "CLUSTER_FAILED",
        Whose.HOST,
        "see whether the API answers, and what the service account may do",
        ("degraded.began", "background.failed"),
        ("CachedDegraded",),
    ),
    FailureKind("TIMED_OUT", Whose.CALLER, "give it longer; cached ls shows how far it is"),
    FailureKind(
        "UNAVAILABLE",
        Whose.DAEMON,
        "try again in a moment",
        (
            "rpc.refused",
            "descriptors.refused",
            "front.accept_failed",
            "descriptors.accept_failed",
            "http.accept_failed",
        ),
        ("CachedNotReady", "CachedDescriptorsNearLimit"),
    ),
    FailureKind(
        "PERMISSION_DENIED",
        Whose.CALLER,
        "ask for access: access.socket_group, access.uids, access.gids",
        ("rpc.refused", "descriptors.refused"),
    ),
    FailureKind(
        "LIMIT_EXCEEDED",
        Whose.CALLER,
        "end some of what is open, or raise the setting that the message names: cached ps",
        ("rpc.refused", "descriptors.refused"),
        ("CachedCallersNearLimit",),
    ),
    FailureKind("LOCAL_ONLY", Whose.CALLER, "ask on the daemon's own host, over its socket"),
    FailureKind(
        "ALREADY_RUNNING",
        Whose.SETTINGS,
        "stop the other daemon, or give this one a state folder and a socket of its own",
        (),
        ("CachedDown",),
    ),
)
"""``ALREADY_RUNNING`` has no event: the daemon that fails so does not come to run. Its log and its exit tell."""

_BY_REASON = {kind.reason: kind for kind in KINDS}


def kind_of(reason: str) -> FailureKind:
    """The kind of a reason; of one that nobody knows, that of a fault of the program."""
    return _BY_REASON.get(reason, _BY_REASON["INTERNAL"])


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the daemon that can be degraded. ``reason``: the kind that it is where no error says another one.

    ``advice``: what to do, in a line; ``runbook``: the heading of docs/operations.md that has more of it.
    """

    meaning: str
    reason: str
    advice: str
    runbook: str


OTHER = "other"
PARTS: dict[str, Part] = {
    "l1": Part(
        "segments of an earlier daemon could not be read", "LEVEL_FAILED",
        "Look at /dev/shm: its mount, its size, its permissions.", "L1 cannot be used",
    ),
    "l2": Part(
        "L2 cannot be written or read", "LEVEL_FAILED",
        "Models are served from memory and the origin meanwhile. Make room on the disk, or look whether it is mounted "
        "and writable (dmesg).",
        "L2 cannot be written",
    ),
    "l2_drives": Part(
        "a drive of L2 is missing", "LEVEL_FAILED",
        "Look for the drive (lsblk, dmesg, mount), then restart the daemon.", "A drive is missing",
    ),
    "index": Part(
        "the index cannot be written: what changes is lost at a restart", "LEVEL_FAILED",
        "Make room in, or mend, the disk of the state folder; then restart.", "The index cannot be written",
    ),
    "journal": Part(
        "journals cannot be written: an interrupted pull begins anew", "LEVEL_FAILED",
        "Only the resume of interrupted pulls suffers. Make room in the state folder.", "The journal cannot be written",
    ),
    "view": Part(
        "the directories of links cannot be written", "LEVEL_FAILED",
        "Engines that read the directory do not see new models. Look at daemon.models_dir.", "The directory view fails",
    ),
    "quarantine": Part(
        "something is damaged and cannot be fetched again", "QUARANTINED",
        "It is tried again within the hour; at once by cached verify --repair. cached show NAME tells the rest.",
        "What is quarantined",
    ),
    "hot": Part(
        "the hot models do not fit into `l1.hot_capacity`", "NO_ROOM",
        "Take the tier hot from a model (cached tier NAME warm), or raise l1.hot_capacity.", "Hot models have no room",
    ),
    "artifacts": Part(
        "a compile artifact cannot be uploaded", "ORIGIN_FAILED",
        "Check artifacts.destination and its credentials; it is tried again.", "An upload fails",
    ),
    "slots": Part(
        "slots of the fleet cannot be asked for: pulls go on without them", "CLUSTER_FAILED",
        "Pulls begin without a slot once they have waited. Check the service account's role on leases.",
        "Slots of the fleet cannot be asked for",
    ),
    "node_labels": Part(
        "the node's labels are not up to date", "CLUSTER_FAILED",
        "The scheduler does not see which models are here; workers are not concerned. Check the service account's role "
        "on nodes.",
        "The node's labels are not up to date",
    ),
    "catalog": Part(
        "the catalog was changed to one that cannot be used: the one before stays",
        "INVALID_CONFIG",
        "Mend the file: cached catalog validate FILE lists what is wrong.",
        "The catalog cannot be used",
    ),
    "tcp": Part(
        "the certificates of the TCP listener were changed to ones that cannot be used: those before stay",
        "INVALID_CONFIG",
        "Put a certificate, its key and its authority into the files of [tcp]; they are read again by themselves.",
        "Certificates cannot be used",
    ),
    OTHER: Part(
        "something else; `cached health` says what", "INTERNAL", "The daemon's log says more: journalctl -u cached.",
        "What is degraded",
    ),
}  # fmt: skip
"""What can be degraded: the values of a label, so a fixed set."""
