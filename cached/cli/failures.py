"""How errors end a command: what is printed, and the exit code."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cached.cli.output import clean
from cached.errors import CachedError
from cached.failures import Whose, kind_of
from cached_client.errors import CacheError

FAILED = 1
USAGE = 2
NOT_FOUND = 3
TIMED_OUT = 4
NO_ROOM = 5
INTEGRITY = 6
INTERRUPTED = 130

EXIT_CODES: dict[str, int] = {
    "INVALID_REQUEST": USAGE,
    "NOT_FOUND": NOT_FOUND,
    "NO_SOURCE": NOT_FOUND,
    "TIMED_OUT": TIMED_OUT,
    "NO_ROOM": NO_ROOM,
    "INTEGRITY": INTEGRITY,
    "QUARANTINED": INTEGRITY,
}
"""Reason → exit code; every other reason is FAILED."""

_SHOWN_IN_MESSAGE = {"status", "problems", "file", "key", "value", "ref", "target"}
"""Fields that the message has told already."""


def exit_code(reason: str) -> int:
    """The exit code that belongs to an error's reason."""
    return EXIT_CODES.get(reason, FAILED)


def print_failure(error: CachedError | CacheError) -> None:
    """``error: …``, its fields, and ``hint: …`` on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), clean(error.message, lines=True)))
    for key, value in sorted(error.fields.items()):
        if key == "trace_id" and kind_of(error.reason).whose is Whose.CALLER:
            continue  # the daemon's log says no more than the message
        if value and key not in _SHOWN_IN_MESSAGE and value not in error.message and value not in error.hint:
            console.print(Text.assemble((f"  {key}: ", "dim"), clean(value)))
    if hint := error.hint or (kind_of(error.reason).hint if isinstance(error, CachedError) else ""):
        console.print(Text.assemble(("hint: ", "bold cyan"), clean(hint)))
