"""How a peer's process is asked to load, and answers: JSON lines on its standard input and output. Stdlib only.

A peer is a module with ``main()`` that calls ``serve(make)``. Imports and the warm-up are not measured, for anybody.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, Protocol

from bench.peers.fingerprint import fingerprint

Order = dict[str, Any]
"""What to load and how, as the benchmark said it on the command line."""


class Loader(Protocol):
    """A peer at work. What ``load`` returns is kept until ``tensors`` was asked for it."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What is measured: distributions, for their versions."""

    def warm_up(self) -> None:
        """Something small, by the same way. Not measured."""

    def load(self) -> Any:
        """The measured load: returns when all tensors can be used."""

    def tensors(self, loaded: Any) -> Iterable[tuple[str, memoryview]]:
        """What was loaded, for the fingerprint. Not measured."""

    def clear(self) -> None:
        """After the loaded was dropped: removes files and so on. Not measured."""


def serve(make: Callable[[Order], Loader]) -> None:
    """Answers until standard input ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loader: Loader | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if loader is None:
                loader = make(json.loads(sys.argv[1]))
            answer = _answer(loader, asked)
        except BaseException as error:  # whatever it is: the peer failed, and says why
            traceback.print_exc()
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(loader: Loader, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["ask"] == "warm-up":
        loader.warm_up()
        loader.clear()
        return {"version": ", ".join(f"{name} {metadata.version(name)}" for name in loader.packages)}
    cpu_s = _cpu_s()
    began_s = time.perf_counter()
    loaded = loader.load()
    seconds = time.perf_counter() - began_s
    answer: dict[str, Any] = {"seconds": seconds, "cpu_s": _cpu_s() - cpu_s, "size_bytes": 0}
    tensors = dict(loader.tensors(loaded))
    answer["size_bytes"] = sum(len(view) for view in tensors.values())
    answer["fingerprint"] = fingerprint(tensors.items(), full=asked["full"])
    del tensors, loaded
    loader.clear()
    return answer


def _cpu_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)
