"""A contestant in a process of its own, with an interpreter of its own: see ``bench/peers``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.fingerprint import fingerprint_of_files
from bench.results import Role, Sample, Unavailable
from cached.cli.measure.cpu import tree_cpu_s

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 300.0
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


class PeerContestant:
    """Runs ``module`` (its name below ``bench.peers``) and checks what it loaded against ``files``.

    ``wrap`` is put before its command, ``server_pids`` are accounted for separately.
    """

    def __init__(
        self,
        name: str,
        title: str,
        *,
        python: Path,
        module: str,
        order: Mapping[str, Any],
        files: Sequence[Path],
        log: Path,
        role: Role = Role.PEER,
        environment: Mapping[str, str] | None = None,
        server_pids: Sequence[int] = (),
        wrap: Sequence[str] = (),
    ) -> None:
        self.name, self.title, self.role, self.version = name, title, role, ""
        self._python = python
        self._command = [*wrap, str(python), "-m", f"bench.peers.{module}", json.dumps(order)]
        self._files = files
        self._log = log
        self._environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | dict(environment or {})
        self._server_pids = tuple(server_pids)
        self._process: subprocess.Popen[str] | None = None
        self._runs = 0

    def prepare(self) -> None:
        """Starts the process and has it load something small, the first time. Raises Unavailable."""
        if self._process is None:
            if not self._python.exists():
                raise Unavailable("not installed: make bench installs the peers")
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=_ROOT, env={**self._environment, "PYTHONPATH": str(_ROOT)},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
            self.version = self._ask({"ask": "warm-up"})["version"]

    def run(self) -> Sample:
        """The peer measures its own load; raises RuntimeError with its reason, or if it loaded something else."""
        full = self._runs == 0
        self._runs += 1
        server_cpu_s = tree_cpu_s(*self._server_pids)
        answer = self._ask({"ask": "load", "full": full})
        server_cpu_s = tree_cpu_s(*self._server_pids) - server_cpu_s
        if answer["fingerprint"] != fingerprint_of_files(self._files, full=full):
            raise RuntimeError("what it loaded is not the checkpoint")
        return Sample(answer["seconds"], answer["size_bytes"], answer["cpu_s"], server_cpu_s=server_cpu_s)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._last_words("it ended")) from None
        deadline_s = time.monotonic() + _TIMEOUT_S
        if not select.select([process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise RuntimeError(self._last_words(f"no answer within {_TIMEOUT_S:g} s"))
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words(f"it ended with status {process.wait()}"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _last_words(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{what}: {lines[-1][:300]}" if lines else what
