"""What the TCP listener asks of its settings and files before it listens at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cached.config import TcpConfig
from cached.errors import ConfigError
from cached.rpc.certificates import Certificates
from cached.rpc.network import Network
from cached_client.errors import InvalidRequestError
from cached_client.network import NetworkConnection, TlsFiles
from tests.certificates import Authority


@pytest.fixture
def config(tmp_path: Path) -> TcpConfig:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    return TcpConfig("localhost:0", str(pair.cert), str(pair.key), str(authority.file), ("viewer",))


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"cert": ""}, "tcp.cert", "tcp.listen is set, but tcp.cert is not: TCP is served with mutual TLS or not at"),
        ({"key": ""}, "tcp.key", "tcp.key is not"),
        ({"client_ca": ""}, "tcp.client_ca", "tcp.client_ca is not"),
        ({"clients": ()}, "tcp.clients", "nobody is named who may come in"),
        ({"key": "/nowhere/key.pem"}, "tcp.key", "/nowhere/key.pem cannot be read: No such file"),
        ({"client_ca": "/dev/null"}, "tcp.client_ca", "holds no authorities"),
    ],
)
def test_a_piece_that_is_missing_is_named(config: TcpConfig, change: dict[str, str], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        Network(replace(config, **change), "/s")
    assert raised.value.fields["key"] == key
    assert raised.value.hint


@pytest.mark.parametrize(
    ("mode", "good"), [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o660, False)]
)
def test_a_key_that_others_may_read_or_change_is_refused(config: TcpConfig, mode: int, good: bool) -> None:
    Path(config.key).chmod(mode)
    if good:
        Certificates(config)
        return
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}: others may read or change it") as raised:
        Certificates(config)
    assert raised.value.hint == f"chmod 0600 {config.key}"


def test_what_is_no_pair_is_refused(config: TcpConfig, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").issue("server")
    with pytest.raises(ConfigError, match="are no pair"):
        Certificates(replace(config, key=str(other.key)))
    Path(config.key).write_text("-----BEGIN RUBBISH")
    with pytest.raises(ConfigError, match="are no pair"):
        Certificates(config)


def test_files_are_read_again_only_when_they_changed_and_bad_ones_change_nothing(config: TcpConfig) -> None:
    certificates = Certificates(config)
    assert not certificates.reload()
    fresh = Authority(Path(config.cert).parent / "fresh").issue("server")
    shutil.copy(fresh.cert, config.cert)
    with pytest.raises(ConfigError, match="are no pair"):
        certificates.reload()
    shutil.copy(fresh.key, config.key)
    assert certificates.reload()
    assert not certificates.reload()


def test_an_address_that_is_taken_is_told(config: TcpConfig) -> None:
    network = Network(replace(config, listen="192.0.2.1:1"), "/s")
    with pytest.raises(ConfigError, match=r"cannot listen on tcp\.listen = '192\.0\.2\.1:1'"):
        network.bind(network.make_server([]))


@pytest.mark.parametrize(
    ("address", "key", "says"),
    [
        ("host", "k", "is not an address"),
        ("http://host:1", "k", "is not an address"),
        ("host:1", "", "no file of the private key was given"),
        ("host:1", "/nowhere", "cannot read the private key /nowhere"),
        ("host:1", "/dev/null", "holds no private key"),
    ],
)
def test_the_client_checks_what_it_is_given(config: TcpConfig, address: str, key: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        NetworkConnection(address, TlsFiles(config.client_ca, config.cert, key))
