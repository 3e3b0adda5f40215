"""Warm-up before users come, and a readiness that tells the truth about it.

::

    from cached_client.warmup import KeepWarm, Readiness, ReadyServer

    readiness = Readiness()
    with ReadyServer(readiness, port=8081):                # answers 503 on /ready, for now
        with readiness.loading() as loading:
            model = loading.watch(cache.attach("llama-13b"))
            module = build(model)
        readiness.warm_up(run, batch_sizes=(1, 8), lengths=(128, 1024))
        ...                                                # 200 on /ready, until the model is lost

Standard library only.
"""

from __future__ import annotations

from cached_client.warmup.endpoint import CompletionsEndpoint
from cached_client.warmup.keep_warm import KeepWarm
from cached_client.warmup.readiness import Loading, Readiness, State, Status
from cached_client.warmup.server import ReadyServer
from cached_client.warmup.shapes import ShapeTimes, WarmUp, warm_up
from cached_client.warmup.web import asgi, wsgi

__all__ = [
    "CompletionsEndpoint",
    "KeepWarm",
    "Loading",
    "Readiness",
    "ReadyServer",
    "ShapeTimes",
    "State",
    "Status",
    "WarmUp",
    "asgi",
    "warm_up",
    "wsgi",
]
