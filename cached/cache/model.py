"""A model as this host knows it: what is said of it, its revisions, and where their blobs are."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from cached.catalog_file import CatalogModel
from cached.index import ModelRecord
from cached.level import Level
from cached.manifest import BlobRecord, Manifest
from cached.schedule import Schedule
from cached.types import Tier

_STRENGTH = (Tier.HOT, Tier.WARM, Tier.AUTO, Tier.COLD)


class Presence(StrEnum):
    """Whether a blob is in L1, and whether its bytes were verified since it came there or since this daemon started."""

    ABSENT = "absent"
    UNCONFIRMED = "unconfirmed"
    CONFIRMED = "confirmed"


@dataclass(slots=True)
class Blob:
    """Content known to this host, and where it is. L2 bytes are verified whenever they are moved."""

    record: BlobRecord
    l1: Presence = Presence.ABSENT
    l2: bool = False
    left_l2: bool = False
    """It was evicted from L2, so that it is not missing there."""

    def at(self, level: Level) -> bool:
        """True if its bytes are at ``level``, confirmed or not."""
        return self.l1 is not Presence.ABSENT if level is Level.L1 else self.l2


@dataclass(frozen=True, slots=True)
class Present:
    """How much of a revision is where."""

    l1_bytes: int
    l2_bytes: int
    confirmed_in_l1: bool
    whole_in_l2: bool

    @classmethod
    def of(cls, blobs: list[Blob]) -> Self:
        """Counts them."""
        return cls(
            l1_bytes=sum(blob.record.size_bytes for blob in blobs if blob.at(Level.L1)),
            l2_bytes=sum(blob.record.size_bytes for blob in blobs if blob.l2),
            confirmed_in_l1=all(blob.l1 is Presence.CONFIRMED for blob in blobs),
            whole_in_l2=all(blob.l2 for blob in blobs),
        )


@dataclass(slots=True)
class Model:
    """A name with its settings and the revisions that are known."""

    record: ModelRecord
    catalog: CatalogModel | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    last_used_s: float = float("-inf")
    """On the monotonic clock, for the policy."""
    kept_until_s: float = float("-inf")
    """The end of the latest keep-alive of its own, likewise."""
    lease_count: int = 0
    schedule: Schedule = Schedule()  # noqa: RUF009 immutable
    """Its hot windows."""
    in_window: bool = False
    """It is within one of them; kept true by the timetable."""
    base_model: Model | None = field(default=None, repr=False, compare=False)
    """The model that it is an adapter of, if that is known."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.record.name

    @property
    def current(self) -> Manifest | None:
        """The manifest of the current revision."""
        return self.manifests.get(self.record.current_revision)

    @property
    def size_bytes(self) -> int:
        """Of its current revision, else what the catalog says; 0 while nobody knows."""
        if self.current is not None:
            return self.current.total_bytes
        return (self.catalog.size_bytes or 0) if self.catalog else 0

    @property
    def source(self) -> str:
        """Where to pull from: the catalog's word, else what the last pull was told; may be empty."""
        return self.catalog.source if self.catalog else self.record.source

    @property
    def tier(self) -> tuple[Tier, str]:
        """The tier that counts and whose word it is: the strongest of operator, catalog and schedule.

        An adapter of which nobody says anything has its base's. Of a hot base it is warm: hundreds of them must not all
        be brought.
        """
        said = [
            (self.record.operator_tier, "operator"),
            (self.catalog.tier if self.catalog else None, "catalog"),
            (Tier.HOT if self.in_window else None, "schedule"),
        ]
        known = [(tier, whose) for tier, whose in said if tier is not None]
        if not known and self.base_model is not None:
            tier = self.base_model.tier[0]
            return (Tier.WARM if tier is Tier.HOT else tier), "base"
        return min(known, key=lambda item: _STRENGTH.index(item[0]), default=(Tier.AUTO, "default"))

    @property
    def keep_until_s(self) -> float:
        """Until then it stays before others, by the keep-alive of its last lease; on the monotonic clock.

        An adapter stays as long as its base: without end while that is leased, hot or pinned.
        """
        base = self.base_model
        if base is None:
            return self.kept_until_s
        if base.lease_count or base.pinned or base.tier[0] is Tier.HOT:
            return float("inf")
        return max(self.kept_until_s, base.kept_until_s)

    @property
    def pinned(self) -> bool:
        """By the operator or by the catalog."""
        return self.record.pinned or bool(self.catalog and self.catalog.pinned)

    @property
    def tenant(self) -> str:
        """The group of models whose quota it counts against: its base's if it has none of its own; empty: none."""
        own = self.catalog.tenant if self.catalog else ""
        return own or (self.base_model.tenant if self.base_model else "")

    @property
    def base(self) -> str:
        """The model that it is an adapter of; empty: none."""
        return self.catalog.base if self.catalog else ""

    @property
    def priority(self) -> int:
        """The catalog's, or that of its base; higher stays longer."""
        own = self.catalog.priority if self.catalog else 0
        return own or (self.base_model.priority if self.base_model else 0)
