"""The timeline of one rank's start, told to the daemon. Knows nothing of vLLM."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import cached_client
from cached_client.coldstart import Timeline
from cached_client.errors import CacheError

if TYPE_CHECKING:
    from cached_client.attach import Model

_log = logging.getLogger("vllm.cached")

_TIMEOUT_S = 5.0


class LoadStart:
    """From the start of this rank's process until its weights are loaded.

    Steps follow one another. What the model's own load consists of (attach, download, …) lies beside them.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        self._timeline = Timeline(labels=labels)
        self._steps: list[tuple[str, float]] = []
        self._model = False

    def step(self, name: str) -> None:
        """What was going on is over, and ``name`` begins."""
        self._steps.append((name, time.monotonic()))

    def loaded(self, model: Model) -> None:
        """The model is complete and its tensors were handed over; it is still attached. Never raises CacheError."""
        try:
            self._timeline.add_model(model)
        except CacheError as error:
            _not_told(error)
        else:
            self._model = True

    def report(self, socket: str) -> None:
        """The last step is over: tells the daemon. Nothing is told if no model was loaded. Never raises CacheError."""
        if not self._model:
            return
        try:
            self._add_steps()
            with cached_client.connect(socket or None) as cache:
                self._timeline.report(cache, client_name="vllm", timeout_s=_TIMEOUT_S)
        except CacheError as error:
            _not_told(error)

    def _add_steps(self) -> None:
        steps, self._steps = self._steps, []
        ends = [*(begin_s for _, begin_s in steps[1:]), time.monotonic()]
        pace = {"l3": "download", "l2": "promote"}.get(self._timeline.labels.get("from_level", ""), "")
        for (name, begin_s), end_s in zip(steps, ends, strict=True):
            self._timeline.add(name, begin_s, end_s, after=pace if name == "load_weights" else "")


def _not_told(error: CacheError) -> None:
    _log.warning("cached: the start was not reported: %s: %s", error.reason, error)
