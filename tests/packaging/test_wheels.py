"""The two distributions as people install them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import Environment, Wheels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NOT_FOR_WORKERS = {"boto3", "botocore", "awscrt", "diskcache", "prometheus-client", "posix-ipc", "aiohttp", "torch"}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheels_hold_their_own_package_and_nothing_else(wheels: Wheels) -> None:
    daemon, client = names(wheels.daemon), names(wheels.client)
    assert {name.split("/")[0] for name in daemon} == {"cached", f"cached-{wheels.daemon.name.split('-')[1]}.dist-info"}
    assert {name.split("/")[0] for name in client} == {
        "cached_client",
        f"cached_client-{wheels.client.name.split('-')[1]}.dist-info",
    }
    assert "cached/py.typed" in daemon
    assert {"cached_client/py.typed", "cached_client/_proto/cached_pb2.pyi"} <= client
    for held in (daemon, client):
        assert any(name.endswith("licenses/LICENSE") for name in held)


def test_every_source_file_is_in_its_wheel(wheels: Wheels) -> None:
    root = Path(__file__).resolve().parents[2]
    for wheel, folder, package in ((wheels.daemon, root, "cached"), (wheels.client, root / "client", "cached_client")):
        sources = {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*.py")}
        assert sources <= names(wheel)


def test_client_wheel_brings_nothing_of_the_daemon(client_environment: Environment) -> None:
    installed = client_environment.distributions()
    assert {"cached-client", "grpcio", "protobuf", "numpy"} <= installed.keys()
    assert not (NOT_FOR_WORKERS | {"cached"}) & installed.keys()


def test_client_imports_in_a_bare_environment(client_environment: Environment) -> None:
    assert client_environment.python("import cached_client; print(callable(cached_client.connect))").strip() == "True"
    client_environment.python("from cached_client._proto import cached_pb2, cached_pb2_grpc")


def test_daemon_wheel_runs(daemon_environment: Environment) -> None:
    installed = daemon_environment.distributions()
    assert installed["cached"] == installed["cached-client"]
    assert "torch" not in installed
    assert installed["cached"] in daemon_environment.command("cached", "version")
