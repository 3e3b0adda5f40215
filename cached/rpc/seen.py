"""The engine as one caller sees it: what the caller may not know of is not there, to every question the same way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NoReturn

import structlog

from cached.access import AccessPolicy, Caller
from cached.artifact_types import Artifact, ArtifactFound, ArtifactOffer, PutOutcome
from cached.cache.absent import no_source, not_in_l1, not_known
from cached.errors import CachedError, NoRoomError, PermissionDeniedError
from cached.leases import check_keep_alive, no_lease, no_such_token
from cached.level import Level
from cached.overview import Limits, Overview
from cached.refs import Ref, parse_ref
from cached.rpc.engine import Attachment, Engine, WholeEngine
from cached.types import (
    Attached,
    Client,
    ColdStart,
    Event,
    Freed,
    LeaseInfo,
    ModelDetail,
    ModelSummary,
    Peer,
    PullPhase,
    PullProgress,
    Selection,
    Stats,
    Tier,
    TierChange,
    VerifyProgress,
)

_log = structlog.get_logger(__name__)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REFUSED = frozenset({"rpc.refused", "descriptors.refused"})
_UNTOLD = "it has to do with other models: an operator can see the reason"


class Views:
    """The engine, as each caller sees it."""

    def __init__(self, engine: WholeEngine, policy: AccessPolicy) -> None:
        self._engine = engine
        self._policy = policy

    def by(self, caller: Caller) -> Engine:
        """What this caller may use. Raises PermissionDeniedError for one to whom nothing here is open."""
        policy = self._policy
        if policy.is_open or policy.is_operator(caller):
            return self._engine
        if not policy.lets_in(caller):
            raise PermissionDeniedError(
                f"{caller.name} may not use this cache",
                hint="an operator lets users in by access.uids, access.gids, or the access list of a model or tenant",
                caller=caller.name,
            )
        return Seen(self._engine, policy, caller)


class Seen:
    """For callers who are no operators. What concerns all is refused before anything is looked at."""

    def __init__(self, engine: WholeEngine, policy: AccessPolicy, caller: Caller) -> None:
        self._engine = engine
        self._policy = policy
        self._caller = caller

    def _sees(self, name: str) -> bool:
        return self._policy.may_see(self._caller, name)

    def _is_hidden(self, name: str) -> bool:
        """The caller may not know of a model of this name, be it here or not. Operators can look up who asked."""
        if self._sees(name):
            return False
        if self._engine.visibility.is_known(name):
            _log.info("access.hidden", caller=self._caller.name, model=name)
        return True

    def _known(self, ref: Ref) -> bool:
        """A model is here, and the caller may know."""
        return not self._is_hidden(ref.name) and self._engine.visibility.is_known(ref.name)

    def _refuse(self, what: str) -> NoReturn:
        raise PermissionDeniedError(
            f"{self._caller.name} is no operator, and only operators {what}",
            hint="ask one, or be named in access.operator_uids or access.operator_gids",
            caller=self._caller.name,
        )

    def _asked(self, ref: str, source: str) -> Ref:
        """A reference that names no source. Whoever names one reads with the daemon's rights."""
        parsed = parse_ref(ref)
        if parsed.uri or source:
            self._refuse("say where a model comes from: name one of the catalog")
        return parsed

    # What one model is about.

    async def pull(
        self,
        ref: str,
        *,
        source: str = "",
        tier: Tier | None = None,
        level: Level = Level.L1,
        wait: bool = True,
        at_time_s: float = 0.0,
    ) -> AsyncIterator[PullProgress]:
        """As the engine does, of what the catalog names."""
        self._engine.require_running()
        parsed = self._asked(ref, source)
        if tier is not None or at_time_s:
            self._refuse("set tiers and times")
        if self._is_hidden(parsed.name):
            yield PullProgress(PullPhase.RESOLVING, parsed.name)
            await asyncio.sleep(0)
            raise no_source(parsed)
        progress = self._engine.pull(ref, level=level, wait=wait)
        try:
            async for item in progress:
                yield item
        except CachedError as error:
            raise self._told(error) from None

    async def attach(
        self,
        ref: str,
        *,
        source: str = "",
        client: Client | None = None,
        resume: bool = False,
        only_if_resident: bool = False,
        keep_alive_s: float = 0.0,
        selection: Selection | None = None,
    ) -> Attachment:
        """As the engine does, of what the catalog names."""
        self._engine.require_running()
        parsed = self._asked(ref, source)
        if self._is_hidden(parsed.name):
            check_keep_alive(keep_alive_s)
            raise not_in_l1(parsed) if resume or only_if_resident else no_source(parsed)
        try:
            return await self._engine.attach(
                ref, client=client or Client(), resume=resume, only_if_resident=only_if_resident,
                keep_alive_s=keep_alive_s, selection=selection,
            )  # fmt: skip
        except CachedError as error:
            raise self._told(error) from None

    def detach(self, lease_id: str, token: str) -> None:
        """Of another's lease it is not even told that it is held."""
        try:
            self._engine.detach(lease_id, token)
        except PermissionDeniedError:
            raise no_lease(lease_id) from None

    def open_descriptors(self, token: str, file_indices: Sequence[int], peer: Peer) -> list[int]:
        """Of a lease on what the caller may see: whoever came by another's token has nothing of it."""
        if not self._sees(self._engine.leased_name(token)):
            raise no_such_token()
        return self._engine.open_descriptors(token, file_indices, peer)

    def describe(self, ref: str) -> ModelDetail:
        """Without what is told of other models, and of how the policy weighs one against the other."""
        parsed = parse_ref(ref)
        if not self._known(parsed):
            raise not_known(parsed)
        detail = self._engine.describe(ref)
        files = tuple(
            replace(file, shared_with=tuple(name for name in file.shared_with if self._sees(name)))
            for file in detail.files
        )
        return replace(
            detail,
            summary=self._summary(detail.summary),
            files=files,
            notes=tuple(map(self._text, detail.notes)),
            last_error=self._text(detail.last_error),
            places=(),
            access="",
        )

    def report_cold_start(self, start: ColdStart) -> None:
        """Of a start with what the caller may see."""
        if not self._known(Ref(start.name)):
            raise not_known(Ref(start.name))
        self._engine.report_cold_start(start)

    def cold_starts(self, ref: str, limit: int) -> tuple[ColdStart, ...]:
        """Of what the caller may see."""
        parsed = parse_ref(ref)
        if not self._known(parsed):
            raise not_known(parsed)
        return self._engine.cold_starts(ref, limit)

    # What all models are about.

    def list_models(self) -> tuple[ModelSummary, ...]:
        """Those that the caller may see."""
        return tuple(self._summary(item) for item in self._engine.list_models() if self._sees(item.name))

    def list_leases(self) -> tuple[LeaseInfo, ...]:
        """Those on what the caller may see."""
        return tuple(item for item in self._engine.list_leases() if self._sees(item.name))

    def stats(self) -> Stats:
        """The levels, and counts of what the caller may see; counters and faults tell of everybody's."""
        return self._stats(self._engine.stats())

    def overview(self, limits: Limits) -> Overview:
        """Of what the caller may see."""
        found = self._engine.overview(limits, self._sees)
        return replace(
            found,
            stats=self._stats(found.stats),
            models=tuple(map(self._summary, found.models)),
            events=tuple(self._event(event) for event in found.events),
            problems=tuple(replace(item, message=self._text(item.message)) for item in found.problems),
        )

    async def watch(self, *, replay: bool) -> AsyncIterator[Event]:
        """Events about what the caller may see; not what was refused: that would tell hidden names from absent ones."""
        events = self._engine.watch(replay=replay)
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if event.name and self._sees(event.name) and event.kind not in _REFUSED:
                    yield self._event(event)

    def _summary(self, summary: ModelSummary) -> ModelSummary:
        return summary if not summary.base or self._sees(summary.base) else replace(summary, base="")

    def _stats(self, stats: Stats) -> Stats:
        names = [name for name in self._engine.visibility.names() if self._sees(name)]
        return replace(
            stats,
            counters={},
            origins=(),
            model_count=len(names),
            lease_count=len(self.list_leases()),
            active_load_count=sum(self._sees(load.name) for load in self._engine.loads()),
            degraded=("something does not work as it should: an operator can see what",) if stats.degraded else (),
        )

    def _event(self, event: Event) -> Event:
        message = self._text(event.message)
        if message == event.message and all(map(self._is_clean, event.fields.values())):
            return event
        return replace(event, message=f"{event.kind}: {_UNTOLD}", fields={})

    def _is_clean(self, text: str) -> bool:
        """No word of it is a model that the caller may not know of."""
        words = {word.rstrip("._-") for word in _WORD.findall(text)} | set(_WORD.findall(text))
        return not any(self._engine.visibility.is_known(word) and not self._sees(word) for word in words)

    def _text(self, text: str) -> str:
        return text if self._is_clean(text) else _UNTOLD

    def _told(self, error: CachedError) -> CachedError:
        """Of the errors of what the caller may see, this one says who has the room."""
        if not isinstance(error, NoRoomError):
            return error
        fields = {key: value for key, value in error.fields.items() if key != "holders" or self._is_clean(value)}
        if fields == error.fields and self._is_clean(error.message):
            return error
        level = error.fields.get("level", "the host")
        return NoRoomError(f"{level} has no room: others hold it", hint="try again later, or ask an operator", **fields)

    # Compile artifacts: code, for what they were compiled for.

    async def find_artifact(self, key: Mapping[str, str], *, local_only: bool) -> ArtifactFound:
        """Of a model that the caller may see."""
        return await self._engine.find_artifact(key, local_only=local_only, sees=self._sees)

    async def list_artifacts(self, *, remote: bool) -> tuple[Artifact, ...]:
        """Of models that the caller may see."""
        return tuple(item for item in await self._engine.list_artifacts(remote=remote) if self._sees(item.name))

    async def put_artifact(
        self, offer: ArtifactOffer, data: AsyncIterator[bytes]
    ) -> tuple[PutOutcome, Artifact | None]:
        """Of a model that is here and that the caller may see: others run what is saved."""
        model = offer.key.get("model", "")
        if model and not (self._sees(model) and self._engine.visibility.is_known(model)):
            self._refuse("save compile artifacts of models that the cache does not know")
        return await self._engine.put_artifact(offer, data)

    def artifact_ticket(self, peer: Peer) -> str:
        """For ``put_artifact``."""
        return self._engine.artifact_ticket(peer)

    # What concerns all.

    async def set_tier(self, ref: str, tier: Tier) -> ModelSummary:
        """Refused."""
        self._refuse("set tiers")

    def what_if(self, ref: str, tier: Tier) -> TierChange:
        """Refused."""
        self._refuse("ask what a tier would lead to")

    async def pin(self, ref: str) -> ModelSummary:
        """Refused."""
        self._refuse("pin models")

    async def unpin(self, ref: str) -> ModelSummary:
        """Refused."""
        self._refuse("unpin models")

    async def evict(self, ref: str, level: Level | None) -> Freed:
        """Refused."""
        self._refuse("evict models")

    async def remove(self, ref: str) -> Freed:
        """Refused."""
        self._refuse("remove models")

    async def verify(self, ref: str | None, *, repair: bool) -> AsyncIterator[VerifyProgress]:
        """Refused."""
        self._refuse("have everything read again")
        yield  # a generator, as the engine's is

    def trace(self) -> Iterator[Attached]:
        """Refused."""
        self._refuse("read the trace of all attaches")
