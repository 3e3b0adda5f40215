"""How an attach went, for the metrics and the traces: from the request to its last byte being ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cached.cache.content import Content
from cached.cache.load import Load
from cached.cache.services import Services
from cached.errors import CachedError
from cached.leases import Lease
from cached.types import Complete


class AttachWatch:
    """Loop only. The span ends when the bytes are ready, however long the lease is then held."""

    def __init__(self, services: Services, name: str, *, counts: bool) -> None:
        """``counts``: it asks for something; a worker that takes its lease up again does not."""
        self._services = services
        self._span = services.tracer.start("attach", {"cached.model": name}, server=True)
        self._started_s = services.clock.monotonic_s()
        self._counts = counts
        self._arrived = False

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Around the search for what is asked for: a load that it begins is a part of this span."""
        try:
            with self._span.active():
                yield
        except BaseException as error:
            self._span.fail(error)
            self._span.end()
            raise

    def opened(self, lease: Lease, content: Content) -> None:
        """It has a lease. A load that another request began is linked to."""
        self._span.set(
            {"cached.revision": lease.revision, "cached.lease.id": lease.lease_id, "cached.bytes": lease.size_bytes}
        )
        if isinstance(content.source, Load):
            self._span.set({"cached.load.id": content.load_id})
            self._span.link(content.source.span)

    def arrived(self) -> None:
        """Some of its bytes are there."""
        if not self._arrived:
            self._arrived = True
            self._span.event("first bytes")

    def completed(self, lease: Lease, complete: Complete) -> None:
        """All of them are."""
        self._span.set({"cached.from_level": complete.from_level.value})
        self._span.end()
        if self._counts:
            seconds = self._services.clock.monotonic_s() - self._started_s
            self._services.metrics.attached(
                lease.name, complete.from_level, seconds, trace_id=self._span.trace_id, lease_id=lease.lease_id
            )

    def failed(self, error: CachedError) -> None:
        """They cannot be had."""
        self._span.fail(error)
        self._span.end()

    def ended(self) -> None:
        """The lease was given back, perhaps before anything of this."""
        self._span.end()
