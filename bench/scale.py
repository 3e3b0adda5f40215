"""What larger hosts would need, from the measured CPU-seconds per GB: a calculation, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.figures import short
from bench.results import FOLDER, read_part
from bench.tables import table

CONNECTION_GB_PER_S = 0.085
"""What one connection to S3 brings: 85 to 90 MB/s, says AWS in its performance guidelines for S3."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A way of bytes, and the result that says what a GB on it costs."""

    title: str
    part: str
    contest: str
    contestant: str
    connected: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """Hardware, and the GB/s that it carries."""

    title: str
    gb_per_s: float
    hops: tuple[Hop, ...]


_S3 = (
    Hop("S3 over HTTP, CRC64-NVME", "s3", "http", "cached-crc", connected=True),
    Hop("S3 over HTTP, SHA-256", "s3", "http", "cached-sha256", connected=True),
    Hop("S3 over TLS, SHA-256", "s3", "tls", "cached-sha256", connected=True),
)
_NVME = (Hop("NVMe to memory", "nvme", "shards", "cached"),)
LINKS = (
    Link("NIC of 100 Gbit/s", 12.5, _S3),
    Link("NIC of 400 Gbit/s", 50.0, _S3),
    Link("8 NVMe drives, PCIe 4.0, 6.5 GB/s each", 52.0, _NVME),
    Link("8 NVMe drives, PCIe 5.0, 12 GB/s each", 96.0, _NVME),
)


def scale_text(folder: Path = FOLDER) -> str:
    """The cores and connections that each link needs to be filled."""
    rows = []
    for link in LINKS:
        for hop in link.hops:
            cost = _cost(folder, hop)
            if cost is not None:
                cores = short(link.gb_per_s * cost)
                connections = short(round(link.gb_per_s / CONNECTION_GB_PER_S)) if hop.connected else "–"
                rows.append([link.title, hop.title, short(link.gb_per_s), short(cost), cores, connections])
    heads = ("hardware", "hop", "GB/s", "all CPU-s/GB", "cores", "connections to S3")
    return table(heads, rows, text_columns=2) if rows else "Nothing was measured yet."


def _cost(folder: Path, hop: Hop) -> float | None:
    path = folder / f"{hop.part}.json"
    if not path.exists():
        return None
    contest = next((contest for contest in read_part(path).contests if contest.name == hop.contest), None)
    standing = contest.get(hop.contestant) if contest else None
    return standing.median("total_cpu_s_per_gb") if standing is not None and standing.measured else None
