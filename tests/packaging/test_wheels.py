"""The two distributions as people install them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import trove_classifiers
from packaging.metadata import Metadata

from tests.integration.harness import DaemonProcess
from tests.integration.support import MB, model_files, sha256
from tests.packaging.conftest import PYTHONS, ROOT, Environment, Wheels

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
    for wheel, folder, package in ((wheels.daemon, ROOT, "cached"), (wheels.client, ROOT / "client", "cached_client")):
        sources = {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*.py")}
        assert sources <= names(wheel)


def test_the_daemons_wheel_has_the_files_of_the_service(wheels: Wheels) -> None:
    with zipfile.ZipFile(wheels.daemon) as archive:
        for source in (ROOT / "systemd").iterdir():
            assert archive.read(f"cached/systemd/{source.name}") == source.read_bytes(), source.name


def test_metadata_is_what_an_index_takes(wheels: Wheels) -> None:
    for wheel in (wheels.daemon, wheels.client):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            told = Metadata.from_email(archive.read(name), validate=True)
        assert told.license_expression == "Apache-2.0"
        assert told.description_content_type == "text/markdown"
        assert told.description
        assert told.keywords
        assert set(told.classifiers or ()) <= trove_classifiers.classifiers
        assert {f"Programming Language :: Python :: {version}" for version in PYTHONS} <= set(told.classifiers or ())
    assert len(list(wheels.daemon.parent.glob("cached*.tar.gz"))) == 2


def test_pip_installs_a_checkout_without_a_warning(wheels: Wheels, tmp_path: Path) -> None:
    """``wheels`` only so that the two do not build in one folder at a time."""
    for source in ("client", "."):
        said = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps",
             "--target", tmp_path / "site", ROOT / source],
            capture_output=True, text=True, env=os.environ | {"PIP_ROOT_USER_ACTION": "ignore"},
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert "warning" not in (said.stdout + said.stderr).lower(), said.stdout + said.stderr


def test_client_in_a_bare_environment(client_environment: Environment) -> None:
    installed = client_environment.distributions()
    assert {"cached-client", "grpcio", "protobuf", "numpy"} <= installed.keys()
    assert not (NOT_FOR_WORKERS | {"cached"}) & installed.keys()
    client_environment.python("from cached_client._proto import cached_pb2, cached_pb2_grpc")
    loaded = client_environment.python("import sys, cached_client; print(*sys.modules)").split()
    assert "cached_client" in loaded
    assert not {"grpc", "numpy", "google.protobuf"} & set(loaded)


def test_daemon_and_client_in_a_bare_environment(daemon_environment: Environment, tmp_path: Path) -> None:
    """As on a host: the daemon from its wheel pulls a model, and a worker reads it from shared memory."""
    installed = daemon_environment.distributions()
    assert "torch" not in installed
    told = json.loads(daemon_environment.command("cached", "version", "-o", "json"))
    assert told["cached"] == told["cached_client"] == installed["cached"] == installed["cached-client"]
    assert told["python"].startswith(f"{daemon_environment.version}.")
    assert "ExecStart=" + str(daemon_environment.path) in daemon_environment.command(
        "cached", "install-service", "--print"
    )
    files = model_files(3 * MB)
    source = tmp_path / "model"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    daemon = DaemonProcess(
        tmp_path / "d",
        models={"m": {"source": f"file://{source}"}},
        command=(str(daemon_environment.path / "bin" / "cached"),),
    )
    with daemon:
        (read,) = daemon_environment.python(
            "import cached_client, hashlib\n"
            f"with cached_client.connect({str(daemon.socket)!r}) as cache, cache.attach('m') as model:\n"
            "    model.wait(60)\n"
            "    print(hashlib.sha256(model.view('model.safetensors')).hexdigest())\n"
        ).splitlines()
        assert read == sha256(files["model.safetensors"])
        assert daemon.terminate() == 0, daemon.log()
