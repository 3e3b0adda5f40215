"""A worker process of a part: told what to do, and answers, in JSON lines on its standard input and output.

Its module, below ``bench.peers``, calls ``answer_lines``. What it imports is not measured.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 300.0
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


class Worker:
    """A context manager: leaving it ends the process. RuntimeError with its last words whenever it fails."""

    def __init__(self, module: str, order: Mapping[str, Any], log: Path, *, python: Path | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | {"PYTHONPATH": str(_ROOT)}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-m", f"bench.peers.{module}", json.dumps(order)],
                cwd=_ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, **question: Any) -> None:
        """Asks, and does not wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._last_words("it ended")) from None

    def hear(self, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
        """The answer to what was told first."""
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        if not select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise RuntimeError(self._last_words(f"no answer within {timeout_s:g} s"))
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words(f"it ended with status {self._process.wait()}"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        """Both."""
        self.tell(**question)
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _last_words(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{what}: {lines[-1][:300]}" if lines else what
