"""The origin ``s3://bucket/prefix`` or ``s3://bucket/path/object``, on AWS or any server that speaks its protocol."""

from __future__ import annotations

from cached.origins.s3.origin import S3Origin

__all__ = ["S3Origin"]
