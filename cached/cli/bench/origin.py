"""The hop from an origin to L1."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from cached.cli.bench.hop import Expectation, Measured, Setting, judged, not_measured
from cached.cli.measure.facts import number, read
from cached.cli.measure.origin import fetch
from cached.cli.measure.scratch import run_cancellable
from cached.errors import CachedError
from cached.origins.base import OriginSpec
from cached.origins.registry import redact

_ABOUT = "an origin to shared memory, each chunk checksummed"
_CPU_S_PER_GB = {"http": 0.5, "https": 1.0}
"""On the reading side, docs/performance.md; over TLS what AES costs comes to it."""
_SHARE = 0.5
_MBIT_PER_GB = 8000


def origin(setting: Setting) -> Iterator[Measured]:
    """The first chunks of the largest object, by the daemon's own planner and movers, into memory that has its pages.

    In an engine of its own: the running daemon is not asked, and forgets and evicts nothing.
    """
    if setting.spec is None:
        yield not_measured("origin", _ABOUT, setting.no_spec)
        return
    uri = redact(setting.spec.uri)
    try:
        found = run_cancellable(fetch(setting.config, setting.spec, setting.size_bytes))
    except (OSError, CachedError) as error:
        told = error.message if isinstance(error, CachedError) else str(error)
        yield not_measured("origin", f"{uri} to shared memory", f"{told}; see `cached doctor --only origins`")
        return
    about = f"{uri} ({found.item.path}) to shared memory, each chunk checksummed"
    expected = _expected(setting, setting.spec)
    yield judged(
        "origin", about, found.span, expected,
        reasons="the store, its distance and its limits; a proxy on the way; too few processors for TLS; a NIC that is "
        "shared", check="origins", note=f"listed in {1000 * found.list_s:.0f} ms",
    )  # fmt: skip


def _expected(setting: Setting, spec: OriginSpec) -> Expectation | None:
    """By the network card, or by what the processors can receive, whichever is less; of folders nothing is known."""
    endpoint = endpoint_of(spec)
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    cores = len(os.sched_getaffinity(0))
    by_cpu = cores / _CPU_S_PER_GB.get(parts.scheme, 1.0)
    if is_local(parts.hostname or ""):
        # The server runs on the same processors, and takes as much again.
        return Expectation(_SHARE * by_cpu / 2, f"{by_cpu / 2:.1f} GB/s that {cores} processors serve and receive")
    card = network_card(setting)
    if card is None or card[1] > by_cpu:
        return Expectation(_SHARE * by_cpu, f"{by_cpu:.1f} GB/s that {cores} processors can receive")
    return Expectation(_SHARE * card[1], f"{card[1]:.1f} GB/s of {card[0]}")


def endpoint_of(spec: OriginSpec) -> str:
    """The URL of the server behind an origin; empty for folders, and where a library decides."""
    scheme = spec.uri.partition("://")[0].lower()
    if scheme in {"http", "https"}:
        return spec.uri
    if scheme == "s3":
        from cached.origins.s3.probe import facts_of

        return facts_of(spec).endpoint_url
    return "" if scheme == "file" else "https://" + spec.uri.partition("://")[2].partition("/")[0]


def is_local(host: str) -> bool:
    """Whether a name leads to this host."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def network_card(setting: Setting) -> tuple[str, float] | None:
    """The card of the default route and its GB/s; None where it does not tell its speed, as virtual ones often do."""
    for line in read(setting.proc / "net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 1 and fields[1] == "00000000":
            mbit_per_s = number(setting.sys / "class/net" / fields[0] / "speed")
            return (fields[0], mbit_per_s / _MBIT_PER_GB) if mbit_per_s and mbit_per_s > 0 else None
    return None
