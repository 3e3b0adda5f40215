"""Questions to an origin, with the retries that every request to one has."""

from __future__ import annotations

from cached.cache.services import Services
from cached.errors import CachedError
from cached.transfer.jobs import FindTensors, ListObjects, ReadTexts, Result, StatObjects


async def asked(services: Services, job: ListObjects | StatObjects | FindTensors | ReadTexts) -> Result:
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
