"""Questions to an origin, with the retries that every request to one has."""

from __future__ import annotations

from typing import Protocol

from cached.clock import Clock
from cached.errors import CachedError
from cached.metrics import Metrics
from cached.transfer.fill import RetryPolicy, Runner
from cached.transfer.jobs import FindTensors, ListObjects, ReadTexts, Result, StatObjects


class Asking(Protocol):
    """What it takes to ask."""

    @property
    def runner(self) -> Runner:
        """Who asks."""
        ...

    @property
    def clock(self) -> Clock:
        """How long is waited before another try."""
        ...

    @property
    def retry(self) -> RetryPolicy:
        """How often it is tried."""
        ...

    @property
    def metrics(self) -> Metrics:
        """Where retries are counted."""
        ...


async def asked(services: Asking, job: ListObjects | StatObjects | FindTensors | ReadTexts) -> Result:
    """The answer of a mover. Raises the last error when the retries are used up, and what is not passing at once."""
    attempt = 1
    while True:
        try:
            return await services.runner.run(job)
        except CachedError as error:
            if not error.retryable or attempt == services.retry.max_attempts:
                raise
            services.metrics.retries.labels(reason=error.reason).inc()
            await services.clock.sleep(services.retry.delay_s(attempt, error))
            attempt += 1
