"""What the edges need of the engine. ``cached.cache.ModelCache`` is the one that is served; tests may bring another."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from cached.artifact_types import Artifact, ArtifactFound, ArtifactOffer, PutOutcome
from cached.errors import CachedError
from cached.level import Level
from cached.overview import Limits, Overview
from cached.types import (
    Attached,
    AttachEvent,
    Client,
    ColdStart,
    Event,
    Freed,
    LeaseInfo,
    ModelDetail,
    ModelSummary,
    Peer,
    PullProgress,
    Selection,
    Stats,
    Tier,
    TierChange,
    VerifyProgress,
)


class Degraded(Protocol):
    """What does not work as it should → why."""

    def get(self, part: str, /) -> str | None:
        """Why, or None."""
        ...

    def began(self, part: str, why: str, error: CachedError | None = None) -> None:
        """It is so, or still is."""
        ...

    def ended(self, part: str) -> None:
        """It is well."""
        ...


class Failures(Protocol):
    """Where failures are counted, logged and told. See cached.cache.failures."""

    @property
    def degraded(self) -> Degraded:
        """What does not work as it should."""
        ...

    def report(self, kind: str, error: CachedError, message: str = "", /, **fields: Any) -> None:
        """Something other than a request failed."""
        ...

    def refused(self, kind: str, error: CachedError, /, **fields: Any) -> None:
        """A request ended with an error of ours."""
        ...

    def bug(self, where: str, bug: BaseException, /, **fields: Any) -> CachedError:
        """A request ended with an exception that nobody foresaw; what its caller may see of it."""
        ...


class Attachment(Protocol):
    """A lease for as long as the context is entered."""

    @property
    def lease_id(self) -> str:
        """The lease's public name."""
        ...

    @property
    def is_here(self) -> bool:
        """Nothing has to be waited for: ``Opened`` comes at once, and says that it is complete."""
        ...

    def events(self) -> AsyncGenerator[AttachEvent]:
        """``Opened`` first; ends when the lease is closed by ``detach``."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> bool | None: ...


class Visible(Protocol):
    """The models that there are."""

    def is_known(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...


class Engine(Protocol):
    """The cache as its edges call it. From the loop only; every method may raise any CachedError."""

    def pull(
        self,
        ref: str,
        *,
        source: str = "",
        tier: Tier | None = None,
        level: Level = Level.L1,
        wait: bool = True,
        at_time_s: float = 0.0,
    ) -> AsyncIterator[PullProgress]: ...

    async def attach(
        self,
        ref: str,
        *,
        source: str = "",
        client: Client = ...,
        resume: bool = False,
        only_if_resident: bool = False,
        keep_alive_s: float = 0.0,
        selection: Selection | None = None,
    ) -> Attachment: ...

    def detach(self, lease_id: str, token: str) -> None: ...

    def list_models(self) -> tuple[ModelSummary, ...]: ...

    def describe(self, ref: str) -> ModelDetail: ...

    def list_leases(self) -> tuple[LeaseInfo, ...]: ...

    async def set_tier(self, ref: str, tier: Tier) -> ModelSummary: ...

    def what_if(self, ref: str, tier: Tier) -> TierChange: ...

    async def pin(self, ref: str) -> ModelSummary: ...

    async def unpin(self, ref: str) -> ModelSummary: ...

    async def evict(self, ref: str, level: Level | None) -> Freed: ...

    async def remove(self, ref: str) -> Freed: ...

    def verify(self, ref: str | None, *, repair: bool) -> AsyncIterator[VerifyProgress]: ...

    def stats(self) -> Stats: ...

    def overview(self, limits: Limits) -> Overview: ...

    def trace(self) -> Iterator[Attached]:
        """What it gives out may be taken in any thread."""
        ...

    async def find_artifact(self, key: Mapping[str, str], *, local_only: bool) -> ArtifactFound: ...

    async def put_artifact(
        self, offer: ArtifactOffer, data: AsyncIterator[bytes]
    ) -> tuple[PutOutcome, Artifact | None]:
        """May answer before all of the data was taken."""
        ...

    async def list_artifacts(self, *, remote: bool) -> tuple[Artifact, ...]: ...

    def artifact_ticket(self, peer: Peer) -> str: ...

    def report_cold_start(self, start: ColdStart) -> None: ...

    def cold_starts(self, ref: str, limit: int) -> tuple[ColdStart, ...]: ...

    def watch(self, *, replay: bool) -> AsyncIterator[Event]: ...

    def open_descriptors(self, token: str, file_indices: Sequence[int], peer: Peer) -> list[int]: ...


class WholeEngine(Engine, Protocol):
    """The cache with what it takes to show a caller a part of it. ``sees``: whether the caller may know of a model."""

    @property
    def failures(self) -> Failures:
        """Where failed requests are told."""
        ...

    @property
    def visibility(self) -> Visible:
        """Which models there are, whoever may know."""
        ...

    def require_running(self) -> None: ...

    def leased_name(self, token: str) -> str: ...

    def loads(self) -> tuple[PullProgress, ...]: ...

    def overview(self, limits: Limits, sees: Callable[[str], bool] | None = None) -> Overview: ...

    async def find_artifact(
        self, key: Mapping[str, str], *, local_only: bool, sees: Callable[[str], bool] = ...
    ) -> ArtifactFound: ...
