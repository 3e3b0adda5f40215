"""Buckets of their own for tests that share a server."""

from __future__ import annotations

import itertools

from tests.servers import S3Server

_names = (f"bucket-of-a-test-{number}" for number in itertools.count())


def new_bucket(server: S3Server) -> str:
    """An empty bucket that no other test has."""
    bucket = next(_names)
    server.create_bucket(bucket)
    return bucket
