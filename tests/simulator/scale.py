"""Makes everything 4,096 times smaller, so that a model is some pages, on a host whose memory nobody else uses.

To be imported before anything else of ours.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import cached.units

SCALE = 4096

if "cached.manifest" in sys.modules:
    raise ImportError("the simulator changes the size of a chunk: it needs a process of its own")
cached.units.CHUNK_BYTES //= SCALE
CHUNK_BYTES = cached.units.CHUNK_BYTES

import cached.cache.capacity as _capacity  # noqa: E402 - now that a chunk is small
import cached.cache.model_cache as _model_cache  # noqa: E402
import cached.cache.storage as _storage  # noqa: E402
import cached.transfer.pool as _pool  # noqa: E402
import cached.transfer.ranges as _ranges  # noqa: E402
import cached.transfer.worker as _worker  # noqa: E402

_storage._SMALLEST_POOLED_BYTES //= SCALE
_storage._SMALLEST_GROWN_BYTES //= SCALE
_storage._LARGEST_GROWN_BYTES //= SCALE
_ranges.STEP_BYTES = CHUNK_BYTES
_model_cache._PROGRESS_S = 1.0
"""Nobody looks at bars here."""
_pool.MoverPool.__init__.__kwdefaults__["job_timeout_s"] = 60.0  # type: ignore[index]
"""Of a chunk of 4 KiB, an honest mover takes 30 s at most; until a hang is noticed, nothing happens but ticks."""
_ranges.CACHED_BYTES = CHUNK_BYTES // 4


class _NoCgroups:
    """No limit but the host's."""

    def memory_left_bytes(self) -> int | None:
        """See Cgroups."""
        return None


_HOST_BYTES = 1 << 30
_capacity.meminfo = lambda _proc=None: {"MemTotal": _HOST_BYTES, "MemAvailable": _HOST_BYTES}  # type: ignore[assignment]
_capacity.Cgroups = _NoCgroups  # type: ignore[assignment,misc,attr-defined]
_capacity.Pressure.look = lambda _self: None  # type: ignore[assignment,method-assign]
_worker.time = SimpleNamespace(perf_counter=lambda: 0.0, thread_time=lambda: 0.0)  # type: ignore[assignment,attr-defined]
