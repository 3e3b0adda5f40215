"""What the engine does again and again beside its requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from cached.clock import Clock
from cached.errors import CachedError

_log = structlog.get_logger(__name__)


async def repeat(clock: Clock, period_s: float, step: Callable[[], Awaitable[None]], *, what: str) -> None:
    """Takes the step after each period, until cancelled. One that fails is logged as ``what``; the next is taken."""
    while True:
        await clock.sleep(period_s)
        try:
            await step()
        except CachedError as error:
            _log.warning(f"{what}.failed", reason=error.reason, cause=error.message)
        except Exception:  # noqa: BLE001 - logged
            _log.exception(f"{what}.bug")  # the next step is worth a try: a task that ended would never be missed
