"""Where the time of a worker's start goes: a timeline of named phases, as a table, a picture, and for the daemon.

::

    from cached_client.coldstart import Timeline

    timeline = Timeline()  # begins when this process was started
    with timeline.phase("imports"):
        import torch
    with cached_client.connect() as cache:
        model = cache.attach("llama-13b")
        ...
        timeline.add_model(model)
        print(timeline.table())
        timeline.report(cache)

Standard library only; what it reports goes over the connection that the worker has anyway.
"""

from __future__ import annotations

from cached_client.coldstart.breakdown import Breakdown, Row, breakdown
from cached_client.coldstart.spans import PHASES, Span
from cached_client.coldstart.timeline import Phase, Timeline

__all__ = ["PHASES", "Breakdown", "Phase", "Row", "Span", "Timeline", "breakdown"]
