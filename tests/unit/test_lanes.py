"""Which origins share a lane, that is the bound on ranges in flight: those of one server."""

from __future__ import annotations

import pytest

from cached.origins.base import OriginSpec
from cached.transfer.lanes import name_of


@pytest.mark.parametrize(
    ("uri", "options", "name"),
    [
        ("file:///models/m", {}, "file:"),
        ("s3://bucket/m", {}, "s3://bucket"),
        ("s3://bucket/m", {"endpoint_url": "http://minio:9000"}, "http://minio:9000"),
        ("hf://org/repo@main", {}, "hf:"),
        ("hf://other/repo", {}, "hf:"),
        ("hf://org/repo", {"endpoint": "https://hub.example"}, "https://hub.example"),
        ("https://models.example/m/", {}, "https://models.example"),
        ("gs://bucket/m", {}, "gs://bucket"),
        ("az://container/m", {}, "az://container"),
        ("az://container/m", {"account": "x"}, "az://container (x)"),
        ("az://container/m", {"account": "y"}, "az://container (y)"),
        (
            "az://container/m",
            {"account": "x", "endpoint": "https://x.example"},
            "az://container (https://x.example, x)",
        ),
        ("gs://bucket/m", {"endpoint": "http://127.0.0.1:4443"}, "gs://bucket (http://127.0.0.1:4443)"),
    ],
)
def test_those_of_one_server_share_a_lane(uri, options, name):
    assert name_of(OriginSpec(uri, options)) == name
