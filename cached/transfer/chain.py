"""Chains of origins: a range comes from the first link that can serve it. Runs in the loop.

The last link of a chain is its authority: what objects there are, their versions, sizes and checksums are its word
alone. Links in front of it (a cache on the node, a mirror) are only ever sources of bytes, and only of bytes that are
proven afterwards: against the checksum of their chunk where that is known, else against that of the whole content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cached.clock import Clock
from cached.errors import (
    CachedError,
    ConfigError,
    IntegrityError,
    InvalidRequestError,
    MoverError,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    OriginUnavailableError,
)
from cached.origins.base import OriginObject, OriginSpec
from cached.singleflight import SingleFlight
from cached.transfer.breaker import Breaker
from cached.transfer.fill import OriginSource, Runner
from cached.transfer.jobs import (
    Fetch,
    FindTensors,
    Job,
    Listing,
    ListObjects,
    Moved,
    Prepare,
    ReadTexts,
    Result,
    StatObjects,
)
from cached.transfer.lanes import name_of

_ABSENT_S = 30.0
"""A cache that lacked an object may have it soon."""
_OTHER_S = 300.0
"""One that has something else of that name is stale, …"""
_WRONG_S = 3600.0
"""… and one whose bytes were wrong has to be looked at by somebody."""
_REMEMBERED = 4096
_LINKS = 1000
"""Models' places at caches that something is known of; catalogs come and go."""

_CANNOT_SERVE = (OriginError, NotFoundError, InvalidRequestError, ConfigError)
"""Of a link in front: the next one is asked. Options that cannot be used are no reason to have no model."""


class Events(Protocol):
    """Where what happened is told."""

    def emit(self, kind: str, message: str, *, name: str = "", revision: str = "", **fields: object) -> None:
        """An event of this kind."""
        ...


class Report(Protocol):
    """Where failures that cost a link its turn are counted and told."""

    def __call__(self, kind: str, error: CachedError, message: str, /, **fields: Any) -> None:
        """An event of this kind, which the error brought about."""
        ...


@dataclass(slots=True)
class _Known:
    """Of one object, as its authority describes it, at one link: ``item`` is the link's own word for it."""

    item: OriginObject | None = None
    skipped_until_s: float = 0.0
    why: str = ""
    served: bool = False


@dataclass(slots=True)
class _Link:
    """One model's place at a cache. ``breaker``: shared by all models that have theirs in the same bucket of it."""

    spec: OriginSpec
    name: str
    breaker: Breaker
    objects: OrderedDict[tuple[str, str], _Known] = field(default_factory=OrderedDict)

    def known(self, item: OriginObject) -> _Known:
        """Of an object of the authority's."""
        key = (item.path, item.version)
        known = self.objects.setdefault(key, _Known())
        self.objects.move_to_end(key)
        if len(self.objects) > _REMEMBERED:
            self.objects.popitem(last=False)
        return known


class Chains:
    """Runs jobs on ``runner``; those of a chain of origins on one of its links.

    ``on_bytes`` hears of the bytes of every range, by the origin's name; ``on_failover`` of each range that a
    link could not serve, with the reason; ``events`` of links that are back, and ``report`` of those that are skipped,
    or sent wrong bytes.
    """

    def __init__(
        self,
        runner: Runner,
        clock: Clock,
        *,
        on_bytes: Callable[[str, int], None] = lambda _origin, _length_bytes: None,
        on_failover: Callable[[str, str], None] = lambda _origin, _reason: None,
        events: Events,
        report: Report,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._on_bytes = on_bytes
        self._on_failover = on_failover
        self._events = events
        self._report = report
        self._breakers: dict[tuple[str, str], Breaker] = {}
        self._links: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], _Link] = OrderedDict()
        self._looking: SingleFlight[tuple[int, str, str], OriginObject] = SingleFlight()

    async def close(self) -> None:
        """Ends what is being looked for."""
        await self._looking.close()

    def skipped(self) -> dict[str, str]:
        """The links that are left alone now → why."""
        return {link.name: link.breaker.cause for link in self._links.values() if link.breaker.is_open}

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        """See Runner. An error of all links names each of them and its cause; it is of the last one's kind."""
        match job:
            case Fetch():
                return await self._fetch(job, priority)
            case FindTensors(origin=OriginSpec(front=(_, *_))):
                return await self._find(job, priority)
            case ListObjects() | StatObjects() | ReadTexts():
                return await self._runner.run(replace(job, origin=job.origin.alone), key=key, priority=priority)
            case _:
                return await self._runner.run(job, key=key, priority=priority)

    def prepare(self, job: Prepare) -> None:
        """See Runner: the authority, which is asked first of all, and the first link that will be asked for bytes."""
        first, last = job.origin.links[0], job.origin.links[-1]
        self._runner.prepare(Prepare(last))
        if job.origin.front:
            self._runner.prepare(Prepare(first))

    def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
        """See Runner."""
        self._runner.prefer(path, offsets, by)

    async def settled(self, path: str) -> bool:
        """See Runner."""
        return await self._runner.settled(path)

    async def standing_in(self, source: OriginSource) -> OriginSource:
        """Where all of an object is to come from whose content nobody can prove: one place, so that none are mixed.

        That is the first link that has the very version, else the authority.
        """
        chain = source.spec
        for spec in chain.front:
            link = self._link(spec)
            if link.breaker.left_s(self._clock.monotonic_s()):
                continue
            try:
                item = await self._item_at(link, source.item)
            except CachedError as error:
                if not _cannot_serve(error):
                    raise
                self._failed(link, error, source.item)
                continue
            if item is not None and item.version and item.version == source.item.version:
                return OriginSource(spec, replace(item, checksums=()), chain=chain)
        return OriginSource(chain.alone, source.item)

    def blame(self, source: OriginSource, error: CachedError) -> bool:
        """A load failed with this of an object. Whether another try gets its bytes from elsewhere.

        Wrong content: no link in front that served any of it is asked for this object again for an hour, and for
        nothing else until a while has passed.
        """
        if source.chain is not None:
            if _cannot_serve(error):
                known = self._link(source.spec).known(source.item)
                known.skipped_until_s, known.why = self._clock.monotonic_s() + _OTHER_S, error.message
            return _cannot_serve(error)
        if not isinstance(error, IntegrityError):
            return False
        links = [self._link(spec) for spec in source.spec.front]
        blamed = [link for link in links if link.known(source.item).served]
        for link in blamed:
            self._wrong(link, source.item, error.message)
            self._on_failover(link.name, IntegrityError.reason)
        return bool(blamed) or self._doubt(links, source.item)

    def _doubt(self, links: list[_Link], item: OriginObject) -> bool:
        """Whether what an earlier daemon left of the object can have been wrong: once that may be a link's fault."""
        now_s = self._clock.monotonic_s()
        asked = [known for known in (link.known(item) for link in links) if now_s >= known.skipped_until_s]
        for known in asked:
            known.skipped_until_s, known.why = now_s + _WRONG_S, f"{item.path} is fetched from its authority"
        return bool(asked)

    async def _fetch(self, job: Fetch, priority: int) -> Result:
        failures: list[str] = []
        for spec in job.origin.front:
            link = self._link(spec)
            try:
                found = await self._served(link, job, priority)
            except CachedError as error:
                if not _cannot_serve(error) and not isinstance(error, IntegrityError):
                    raise
                failures.append(f"{link.name} ({error.message})")
                self._on_failover(link.name, error.reason)
                continue
            if isinstance(found, Moved):
                return found
            failures.append(f"{link.name} ({found})")
        return await self._from_last(job, priority, failures)

    async def _from_last(self, job: Fetch, priority: int, failures: list[str]) -> Result:
        last = self._link(job.origin.alone)
        try:
            return await self._moved(last, job, job.item, priority)
        except (OriginError, NotFoundError) as error:
            if failures:
                raise _of_all(error, last.name, failures) from error
            raise

    async def _served(self, link: _Link, job: Fetch, priority: int) -> Moved | str:
        """The range from a link in front; or why it is not asked. Raises why it could not."""
        known = link.known(job.item)
        now_s = self._clock.monotonic_s()
        if now_s < known.skipped_until_s:
            return known.why
        if not link.breaker.take(now_s):
            return f"not asked for {link.breaker.left_s(now_s):.0f} s: {link.breaker.cause}"
        try:
            moved = await self._asked(link, known, job, priority)
        except CachedError as error:
            self._failed(link, error, job.item)
            raise
        except BaseException:
            link.breaker.gave_up()
            raise
        if job.expected_crc64 is not None and moved.crc64 != job.expected_crc64:
            why = f"bytes {job.offset_bytes} to {job.offset_bytes + job.length_bytes - 1} are not those of this version"
            self._wrong(link, job.item, why)
            raise IntegrityError(why, path=job.item.path)
        known.served = True
        if link.breaker.succeeded():
            self._events.emit("origin.back", f"{link.name} serves again", origin=link.name)
        return moved

    async def _asked(self, link: _Link, known: _Known, job: Fetch, priority: int) -> Moved:
        item = known.item or await self._item_at(link, job.item)
        assert item is not None  # noqa: S101 - known.skipped_until_s was looked at
        try:
            return await self._moved(link, job, item, priority)
        except ObjectChangedError:
            # What came before of it is of another version than what would come now: the check of the whole would fail.
            known.item = None
            raise

    async def _moved(self, link: _Link, job: Fetch, item: OriginObject, priority: int) -> Moved:
        answer = await self._runner.run(replace(job, origin=link.spec, item=item), priority=priority)
        if not isinstance(answer, Moved):
            raise MoverError("a mover answered a move with something else")
        self._on_bytes(link.name, answer.length_bytes)
        return replace(answer, origin=link.name)

    async def _item_at(self, link: _Link, item: OriginObject) -> OriginObject | None:
        """What the link calls the object, asked once; None while it is known not to have it. Raises why it has not."""
        known = link.known(item)
        if self._clock.monotonic_s() < known.skipped_until_s:
            return None
        if known.item is None:
            known.item = await self._looking.do((id(link), item.path, item.version), lambda: self._look(link, item))
        return known.item

    async def _look(self, link: _Link, item: OriginObject) -> OriginObject:
        answer = await self._runner.run(StatObjects(link.spec, (item.path,)))
        if not isinstance(answer, Listing):
            raise MoverError("a mover answered a stat with something else")
        found = answer.items[0]
        if found.size_bytes != item.size_bytes:
            raise ObjectChangedError(
                f"{item.path} has {found.size_bytes} bytes there, not {item.size_bytes}", uri=link.spec.uri,
                path=item.path, expected=item.version, found=found.version,
            )  # fmt: skip
        return found

    async def _find(self, job: FindTensors, priority: int) -> Result:
        """Where tensors lie in a file is the authority's word; of another place only while it has the same version."""
        chain = job.origin
        assert chain is not None  # noqa: S101 - matched
        try:
            return await self._runner.run(replace(job, origin=chain.alone), priority=priority)
        except OriginUnavailableError as error:
            for spec in chain.front:
                try:
                    return await self._runner.run(replace(job, origin=spec), priority=priority)
                except CachedError as other:
                    if not _cannot_serve(other):
                        raise
            raise error from None

    def _failed(self, link: _Link, error: CachedError, item: OriginObject) -> None:
        """What is missing or other at a link says nothing of its other objects; everything else does."""
        now_s = self._clock.monotonic_s()
        of_object = isinstance(error, NotFoundError | ObjectChangedError)
        if of_object:
            known = link.known(item)
            known.skipped_until_s = now_s + (_ABSENT_S if isinstance(error, NotFoundError) else _OTHER_S)
            known.why = error.message
        if of_object or not _cannot_serve(error):
            link.breaker.gave_up()
            return
        # Who refuses credentials, or has no usable options, will do so again.
        at_once = not isinstance(error, OriginError | MoverError) or not error.retryable
        if link.breaker.failed(now_s, error.message, at_once=at_once):
            pause_s = link.breaker.left_s(now_s)
            self._report(
                "origin.skipped", error, f"{link.name} is not asked for {pause_s:.0f} s: {error.message}",
                origin=link.name,
            )  # fmt: skip

    def _wrong(self, link: _Link, item: OriginObject, why: str) -> None:
        now_s = self._clock.monotonic_s()
        known = link.known(item)
        known.item, known.served = None, False
        known.skipped_until_s, known.why = now_s + _WRONG_S, f"it sent wrong bytes of {item.path}"
        link.breaker.failed(now_s, known.why, at_once=True)
        self._report(
            "origin.blamed", IntegrityError(why, path=item.path),
            f"{link.name} sent wrong bytes of {item.path}, which come from elsewhere now: {why}",
            origin=link.name,
        )  # fmt: skip

    def _link(self, spec: OriginSpec) -> _Link:
        key = (spec.uri, tuple(sorted(spec.options.items())))
        link = self._links.get(key)
        if link is None:
            name, bucket = name_of(spec), spec.uri.partition("://")[2].partition("/")[0]
            breaker = self._breakers.setdefault((name, bucket), Breaker())
            link = self._links[key] = _Link(spec, name, breaker)
        self._links.move_to_end(key)
        if len(self._links) > _LINKS:
            self._links.popitem(last=False)
            used = {id(link.breaker) for link in self._links.values()}
            self._breakers = {place: breaker for place, breaker in self._breakers.items() if id(breaker) in used}
        return link


def _cannot_serve(error: CachedError) -> bool:
    """Whether the next link is to be asked.

    An exception that nobody foresaw is as good a reason as any. The death of a mover is none: the pool gives its work
    to others, and what it may still do to their target is the pool's to know.
    """
    return isinstance(error, _CANNOT_SERVE) or (isinstance(error, MoverError) and "raised" in error.fields)


def _of_all(error: CachedError, last: str, failures: list[str]) -> CachedError:
    causes = [*failures, f"{last} ({error.message})"]
    fields: dict[str, Any] = {**error.fields, "links": len(causes)}
    return type(error)(
        f"none of the {len(causes)} origins could serve it: {'; '.join(causes)}", hint=error.hint, **fields
    )
