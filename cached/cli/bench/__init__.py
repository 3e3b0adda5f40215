"""`cached bench`: a short measured check of each hop on this host, compared with what is to be expected."""

from __future__ import annotations

from cached.cli.bench.command import bench

__all__ = ["bench"]
