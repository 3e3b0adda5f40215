"""Runs the code of a page as its reader would, top to bottom in one shell, and compares what it prints with the page.

Blocks of ``bash`` and ``python`` are run. A block without a language, or of ``text``, shows what was printed since the
one before it. ``<!-- not run: why -->`` before a block leaves it out. Times, speeds and the widths of
columns are not compared.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(<!-- not run: .+ -->\n+)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"
_TIMEOUT_S = 280


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page says is printed, and what was."""

    told: str
    printed: str


def run_page(
    text: str, folder: Path, environment: Mapping[str, str], exchanged: Mapping[str, str] | None = None
) -> list[Shown]:
    """Runs the blocks of ``text`` in ``folder``. AssertionError if a command fails, with what was said until then.

    ``exchanged``: addresses and paths of the page → those that the test has for them.
    """
    script = ["set -e"]
    told: list[str] = []
    for left_out, language, code in _BLOCK.findall(text):
        if left_out:
            continue
        if language == "bash":
            script.append(_exchange(code, exchanged or {}))
        elif language == "python":
            script.append(f"python -c {shlex.quote(_exchange(code, exchanged or {}))}")
        elif language in {"", "text"}:
            told.append(code)
            script.append(f"printf '{_MARK}'")
    back = {new: old for old, new in (exchanged or {}).items()}
    printed = _exchange(_run("\n".join(script), folder, environment), back).split(_MARK)
    return [Shown(masked(one), masked(other)) for one, other in zip(told, printed, strict=False)]


def _run(script: str, folder: Path, environment: Mapping[str, str]) -> str:
    errors, output = folder / "errors", folder / "output"
    with errors.open("wb") as error_file, output.open("wb") as output_file:
        shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-c", script], cwd=folder, env=dict(environment),
            stdin=subprocess.DEVNULL, stdout=output_file, stderr=error_file, start_new_session=True,
        )  # fmt: skip
        try:
            status = shell.wait(_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    said = output.read_text().replace(_MARK, "\n---\n")
    assert status == 0, f"the page fails; printed:\n{said}\nerrors:\n{errors.read_text()[-5000:]}"
    return output.read_text()


def _exchange(text: str, exchanged: Mapping[str, str]) -> str:
    for old, new in exchanged.items():
        text = text.replace(old, new)
    return text


def masked(text: str) -> str:
    """Without what differs from run to run: times, speeds, padding."""
    text = re.sub(r"\d+(\.\d+)? [MG]B/s", "SPEED", text)
    text = re.sub(r"\b\d+(\.\d+)? ?(ms|s|min|h)\b", "TIME", text)
    return "\n".join(re.sub(r"\s+", " ", line).strip() for line in text.strip().splitlines())
