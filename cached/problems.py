"""What is wrong in the settings or the catalog, and how it is told: all of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cached.errors import ConfigError
from cached.logs import redact_text

_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file or variable. ``where`` is the file (with its line) or variable it is in.

    ``value`` is shown, without what may be secret in it: whoever makes a mistake often makes it with a password.
    """

    where: str
    key: str
    value: str
    wrong: str
    right: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", redact_text(self.value))

    def __str__(self) -> str:
        shown = f" = {self.value}" if self.value else ""
        return f"{self.where}: {self.key}{shown}: {self.wrong}"


def report_problems(problems: Sequence[Problem], *, file: str, hint: str = "") -> None:
    """Raises one ConfigError for all of them, or returns. Its fields are those of the first."""
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        message, hint = str(first), first.right or hint
    else:
        lines = [f"  - {item}" + (f" ({item.right})" if item.right else "") for item in problems]
        message = "\n".join([f"{len(problems)} problems:", *lines])
    raise ConfigError(message, hint=hint, file=file, key=first.key, value=first.value, problems=len(problems))


def shown(value: object, render: Callable[[Any], str] = repr) -> str:
    """The start of a value as text. Some have none: a number of thousands of digits, or what nests too deeply."""
    try:
        return render(value)[:_SHOWN_CHARS]
    except (ValueError, RecursionError):
        return f"({type(value).__name__}, too large to show)"


def nearest(word: str, words: Sequence[str]) -> str:
    """What to say about an unknown key: the nearest known one, else all of them."""
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(words)}"
