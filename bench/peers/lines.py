"""The worker's side of ``bench/worker.py``. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Order = dict[str, Any]


def answer_lines(make: Callable[[Order], Callable[[Order], Order]]) -> None:
    """Answers each line of standard input until it ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    handler: Callable[[Order], Order] | None = None
    for line in sys.stdin:
        try:
            if handler is None:
                handler = make(json.loads(sys.argv[1]))
            answer = handler(json.loads(line))
        except BaseException as error:  # whatever it is: the contestant failed, and says why
            traceback.print_exc()
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
