"""Clients of S3 that models share: one for all of the same options, closed with the last, renewed after a refusal."""

from __future__ import annotations

import pytest

from cached.errors import OriginDeniedError
from cached.origins.base import OriginSpec
from cached.origins.s3.client import Connection
from cached.origins.s3.options import S3Options
from cached.origins.s3.origin import S3Origin
from cached.origins.s3.shared import SharedConnections
from cached.transfer.worker import OpenOrigins
from tests.servers import RcloneS3


@pytest.fixture
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture
def closed(monkeypatch):
    """Clients that were closed."""
    found = []
    made = Connection._make

    def make(self, attempts):
        client = made(self, attempts)
        closing = client.close

        def close() -> None:
            found.append(client)
            closing()

        monkeypatch.setattr(client, "close", close)
        return client

    monkeypatch.setattr(Connection, "_make", make)
    return found


def test_what_botocore_reads_of_its_services_are_dicts(credentials):
    loader = Connection(S3Options(endpoint_url="http://127.0.0.1:1"))._session.get_component("data_loader")
    assert type(loader.load_service_model("s3", "service-2")) is dict


def test_the_same_options_share_a_client_until_the_last_gives_it_back(credentials, closed):
    connections = SharedConnections()
    options = S3Options(endpoint_url="http://127.0.0.1:1")
    first, second = connections.take(options), connections.take(S3Options(endpoint_url="http://127.0.0.1:1"))
    other = connections.take(S3Options(endpoint_url="http://127.0.0.1:2"))
    assert first is second
    assert other is not first
    assert first.objects("a") is second.objects("a")
    assert first.objects("a") is not first.objects("b")
    connections.give_back(first)
    assert not closed
    connections.give_back(second)
    assert closed == [first.connection.client]
    again = connections.take(options)
    assert again is not first
    connections.give_back(again)
    connections.give_back(other)
    assert len(closed) == 3


def test_after_a_refusal_nobody_else_gets_the_client_and_those_who_have_it_keep_it(credentials, closed):
    connections = SharedConnections()
    options = S3Options(endpoint_url="http://127.0.0.1:1")
    refused = connections.take(options)
    refused.connection.denied = True
    fresh = connections.take(options)
    assert fresh is not refused
    connections.give_back(refused)
    assert closed == [refused.connection.client]
    assert connections.take(options) is fresh


def test_two_hundred_models_of_a_store_need_one_client(credentials, closed, monkeypatch):
    made = []
    make = Connection._make

    def counted(self, attempts):
        made.append(self)
        return make(self, attempts)

    monkeypatch.setattr(Connection, "_make", counted)
    origins = OpenOrigins()
    for number in range(200):
        with origins.use(OriginSpec(f"s3://bucket/m{number}", {"endpoint_url": "http://127.0.0.1:1"})) as origin:
            origin.prepare()
    assert len(made) == 1
    origins.close()
    assert len(closed) == 1


def test_credentials_that_changed_after_a_refusal_are_found_while_another_model_is_in_use(tmp_path, monkeypatch):
    with RcloneS3(tmp_path / "s3") as server:
        server.create_bucket("models")
        server.put("models", "a/config.json", b"{}")
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not this one")
        origins, spec = OpenOrigins(), server.spec("s3://models/a")
        with origins.use(server.spec("s3://models/b")) as held:
            held.prepare()
            with pytest.raises(OriginDeniedError), origins.use(spec) as origin:
                origin.list_objects()
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.env()["AWS_SECRET_ACCESS_KEY"])
            with origins.use(spec) as origin:
                assert isinstance(origin, S3Origin)
                assert [item.path for item in origin.list_objects()] == ["config.json"]
        origins.close()
