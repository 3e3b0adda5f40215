"""libcachesim's policies over a trace: which attaches they would have had in a memory of so many MB.

Standard input: JSON ``{"policy", "capacity_mb", "rows": [[id, size_mb], …]}``. Standard output: a JSON list, 1 for each
attach that hit. A process of its own for each policy: some do not come to an end on some traces.
"""

from __future__ import annotations

import json
import sys

import libcachesim


def main() -> None:
    """Plays the trace once."""
    order = json.load(sys.stdin)
    cache = getattr(libcachesim, order["policy"])(cache_size=order["capacity_mb"])
    request = libcachesim.Request()
    hits = []
    for number, size_mb in order["rows"]:
        request.obj_id, request.obj_size = number, size_mb
        hits.append(int(cache.get(request)))
    json.dump(hits, sys.stdout)


if __name__ == "__main__":
    main()
