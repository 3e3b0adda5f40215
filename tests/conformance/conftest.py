"""S3 servers, with the credentials for them in the environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import MotoS3, RcloneS3, S3Server, s3_env


@pytest.fixture(params=["rclone", "moto"])
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    found: S3Server = request.getfixturevalue(f"{request.param}_s3")
    with s3_env(found):
        yield found


@pytest.fixture
def moto(moto_s3: MotoS3) -> Iterator[MotoS3]:
    with s3_env(moto_s3):
        yield moto_s3


@pytest.fixture
def rclone(rclone_s3: RcloneS3) -> Iterator[RcloneS3]:
    with s3_env(rclone_s3):
        yield rclone_s3
