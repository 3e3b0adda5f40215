"""A worker for tests, in a process of its own: attaches, and does what its standard input says. JSON lines both ways.

``python -m tests.integration.worker_process SOCKET``
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cached_client


class _Worker:
    def __init__(self, target: str) -> None:
        self._cache = cached_client.connect(target)
        self._model: Any = None
        self._kept: dict[str, memoryview] = {}

    def attach(self, ref: str, wait: bool = True, **options: Any) -> dict[str, Any]:
        self._model = self._cache.attach(ref, wait=wait, timeout_s=60, client_name="test worker", **options)
        return {"revision": self._model.revision, "complete": self._model.complete}

    def wait(self) -> dict[str, Any]:
        return {"from_level": self._model.wait(60).from_level}

    def digests(self) -> dict[str, str]:
        views = self._kept or {path: self._model.view(path, 60) for path in self._model.files}
        return {path: hashlib.sha256(view).hexdigest() for path, view in views.items()}

    def damaged(self) -> list[tuple[str, int, int]]:
        return [(item.path, item.offset_bytes, item.length_bytes) for item in self._model.damaged]

    def lease_lost(self) -> str:
        return str(self._model.lease_lost or "")

    def forget_lease(self) -> None:
        """Gives the lease back and goes on reading from the mappings, as a tensor that outlives its model does."""
        self._kept = {path: self._model.view(path) for path in self._model.files}
        self.detach()

    def detach(self) -> None:
        self._model.close()
        self._model = None

    def pss_bytes(self) -> int:
        """The kernel's proportional share of all that this process maps, in bytes."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    worker = _Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(worker, request.pop("do"))
        answer: dict[str, Any]
        try:
            answer = {"ok": method(**request)}
        except cached_client.CacheError as error:
            answer = {"error": error.reason, "message": error.message, "fields": error.fields}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
