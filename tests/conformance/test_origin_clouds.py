"""What origins at Google's and Azure's stores must make of servers that break, lie or refuse."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cached import checksum
from cached.errors import (
    CachedError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)
from cached.origins.base import Abort, OriginChecksum, OriginSpec
from cached.origins.registry import open_origin, open_writable
from tests.cloud_servers import ACCOUNT_KEY, Azure, FakeGcs, azure_env
from tests.conformance.reading import read_range
from tests.fault_proxy import CountingProxy, FaultKind
from tests.http_servers import HttpServer, _Handler
from tests.servers import make_certificate

DATA = bytes(range(256)) * 4000
_containers = (f"cloudy-{number}" for number in itertools.count())


@dataclass
class Cloud:
    """A container of a cloud, behind a proxy."""

    server: Any
    container: str
    scheme: str
    proxy: CountingProxy

    def open(self, **options: str) -> Any:
        given = {
            "endpoint": self.proxy.endpoint_url,
            **({"anonymous": "true"} if self.scheme == "gs" else {}),
            **options,
        }
        return open_origin(OriginSpec(f"{self.scheme}://{self.container}/m", given))

    def put(self, path: str, data: bytes) -> None:
        self.server.put(self.container, f"m/{path}", data)


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    container = next(_containers)
    if request.param == "gs":
        gcs: FakeGcs = request.getfixturevalue("fake_gcs")
        gcs.create_bucket(container)
        with CountingProxy(gcs.url) as proxy:
            yield Cloud(gcs, container, "gs", proxy)
        return
    for name, value in azure_env().items():
        monkeypatch.setenv(name, value)
    with Azure() as azure, CountingProxy(azure.url) as proxy:
        azure.containers[container] = {}
        yield Cloud(azure, container, "az", proxy)


def read(origin: Any, item: Any, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
    buffer = bytearray(item.size_bytes - offset_bytes if length_bytes is None else length_bytes)
    read_range(origin, item, offset_bytes, memoryview(buffer))
    return bytes(buffer)


FAULTS: list[tuple[FaultKind, dict[str, Any], type[CachedError]]] = [
    ("truncate", {"after_bytes": 5000}, OriginError),
    ("short_length", {"after_bytes": 5000}, OriginProtocolError),
    ("wrong_range", {}, OriginProtocolError),
    ("status", {"status": 503}, OriginUnavailableError),
    ("status", {"status": 500}, OriginUnavailableError),
    ("status", {"status": 429}, OriginUnavailableError),
    ("status", {"status": 403}, OriginDeniedError),
    ("status", {"status": 404}, NotFoundError),
    ("reset", {}, OriginUnavailableError),
    ("reset", {"after_bytes": 5000}, OriginUnavailableError),
    ("etag", {}, ObjectChangedError),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_the_right_error_once_and_then_forgotten(cloud, kind, settings, expected):
    cloud.put("w", DATA)
    origin = cloud.open()
    item = origin.stat("w")
    fault = cloud.proxy.inject(kind, ranged=True, **settings)
    with pytest.raises(expected) as error:
        read(origin, item, 1000, 20_000)
    assert error.value.hint
    assert error.value.retryable == (kind != "etag" and settings.get("status") not in {403, 404})
    assert "w of " in str(error.value)
    assert ACCOUNT_KEY not in str(error.value.to_dict())
    assert fault.hits == 1, "the origin does not retry: that is the planner's"
    assert read(origin, item, 1000, 20_000) == DATA[1000:21_000]
    origin.close()


def test_an_abort_ends_a_read_that_waits(cloud):
    cloud.put("w", DATA)
    origin = cloud.open()
    item = origin.stat("w")
    fault = cloud.proxy.inject("hold", after_bytes=300_000)
    abort = Abort()
    ended: list[CachedError] = []

    def wait() -> None:
        try:
            with origin.open_range(item, 0, len(DATA), abort) as read_into:
                read_into(memoryview(bytearray(len(DATA))))
        except CachedError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert fault.reached.wait(30)
    abort.abort()
    thread.join(30)
    assert [type(error) for error in ended] == [OriginUnavailableError]
    cloud.proxy.heal()
    assert read(origin, item, 0, 100) == DATA[:100]
    origin.close()


def test_a_silent_server_times_out(cloud):
    cloud.put("w", DATA)
    origin = cloud.open(read_timeout_s="0.3")
    item = origin.stat("w")
    cloud.proxy.inject("hold", after_bytes=100)
    with pytest.raises(OriginUnavailableError):
        read(origin, item, 0, 5000)
    cloud.proxy.heal()
    origin.close()


def test_what_is_not_there(cloud):
    origin = cloud.open()
    with pytest.raises(NotFoundError):
        origin.list_objects()
    origin.close()
    if cloud.scheme == "gs":
        return  # the emulator answers 500 for a bucket that is not there
    cloud.container = "there-is-no-such"
    with pytest.raises(NotFoundError) as error:
        cloud.open().list_objects()
    assert error.value.hint


def test_google_vouches_for_a_crc32c(fake_gcs):
    fake_gcs.create_bucket(bucket := next(_containers))
    fake_gcs.put(bucket, "m/w", DATA)
    origin = open_origin(OriginSpec(f"gs://{bucket}/m", {"endpoint": fake_gcs.url, "anonymous": "true"}))
    item = origin.stat("w")
    assert item.checksums == (OriginChecksum("crc32c", checksum.part_digest("crc32c", DATA)),)
    assert origin.list_objects()[0].checksums == ()
    origin.close()


class _Google(HttpServer):
    """Hands out a token for a service account's signed assertion; refuses all else, and remembers what was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        super().__init__()

    def handle(self, request: _Handler) -> None:
        if request.path == "/token":
            assert b"assertion=" in request.rfile.read(int(request.headers["Content-Length"]))
            told = {"access_token": "issued-secret", "expires_in": 3600, "token_type": "Bearer"}
            request.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        else:
            self.shown.append(request.headers.get("Authorization", ""))
            request.answer(403, b"<Error><Code>AccessDenied</Code></Error>")


def test_a_service_account_is_used_and_a_refusal_says_what_to_do(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with _Google() as google:
        account = {
            "type": "service_account", "client_email": "me@example.com", "private_key": key.decode(),
            "private_key_id": "1", "token_uri": f"{google.url}/token",
        }  # fmt: skip
        (tmp_path / "account.json").write_text(json.dumps(account))
        options = {"endpoint": google.url, "credentials_file": str(tmp_path / "account.json")}
        origin: Any = open_origin(OriginSpec("gs://bucket-name/m", options))
        for call in (origin.list_objects, lambda: origin.stat("w")):
            with pytest.raises(OriginDeniedError) as error:
                call()
            assert "credentials_file" in error.value.hint
            assert "issued-secret" not in str(error.value.to_dict())
        assert set(google.shown) == {"Bearer issued-secret"}
        assert origin._token.header() == "Bearer issued-secret"
        origin.close()
    (tmp_path / "account.json").write_text("{}")
    with pytest.raises(OriginDeniedError, match="no usable Google credentials") as error:
        open_origin(OriginSpec("gs://bucket-name/m", options)).list_objects()
    assert "GOOGLE_APPLICATION_CREDENTIALS" in error.value.hint


def test_a_wrong_key_of_azure_is_denied_and_a_public_container_needs_none(monkeypatch):
    with Azure() as azure:
        azure.containers["models"] = {}
        azure.put("models", "m/w", DATA)
        for name, value in azure_env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcta2V5")
        origin = open_origin(OriginSpec("az://models/m", {"endpoint": azure.url}))
        with pytest.raises(OriginDeniedError) as error:
            origin.list_objects()
        assert "AZURE_STORAGE_ACCOUNT_KEY" in error.value.hint
        assert "d3Jvbmcta2V5" not in str(error.value.to_dict())
        azure.public.add("models")
        public = open_origin(OriginSpec("az://models/m", {"endpoint": azure.url, "anonymous": "true"}))
        assert read(public, public.stat("w"), 5, 10) == DATA[5:15]
        assert public.stat("w").checksums == ()


def test_an_account_is_needed_for_azure():
    with pytest.raises(InvalidRequestError, match="Account") as error:
        open_origin(OriginSpec("az://models/m")).list_objects()
    assert "AZURE_STORAGE_ACCOUNT_NAME" in error.value.hint


def test_large_uploads_go_in_parts(tmp_path, monkeypatch):
    for name, value in azure_env().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "large").write_bytes(data := os.urandom(33 << 20) + b"end")
    with Azure() as azure, CountingProxy(azure.url) as proxy:
        azure.containers["models"] = {}
        sent: list[int] = []
        origin = open_writable(OriginSpec("az://models/m", {"endpoint": proxy.endpoint_url}))
        assert origin.upload_file(tmp_path / "large", "large", sent.append).size_bytes == len(data)
        assert sum(sent) == len(data)
        assert len(proxy.requests("PUT")) == 4
        assert azure.containers["models"]["m/large"][0] == data
        origin.close()


def test_tls_needs_the_right_authority(tmp_path, monkeypatch):
    import ssl

    for name, value in azure_env().items():
        monkeypatch.setenv(name, value)
    with Azure() as azure:
        certificate, key = make_certificate(tmp_path, authority=False)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        azure._server.socket = context.wrap_socket(azure._server.socket, server_side=True)
        azure.containers["models"] = {}
        azure.put("models", "m/w", DATA)
        url = azure.url.replace("http://127.0.0.1", "https://localhost")
        origin = open_origin(OriginSpec("az://models/m", {"endpoint": url, "ca_bundle": str(certificate)}))
        assert read(origin, origin.stat("w"), 5, 10) == DATA[5:15]
        origin.close()
        with pytest.raises(OriginError, match="certificate") as error:
            open_origin(OriginSpec("az://models/m", {"endpoint": url})).list_objects()
        assert "ca_bundle" in error.value.hint


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("gs://", {}),
        ("gs://UPPER/x", {}),
        ("gs://user:secret@bucket/x", {}),
        ("gs://bucket/x", {"account": "x"}),
        ("gs://bucket/x", {"endpoint": "x"}),
        ("gs://bucket/x", {"anonymous": "maybe"}),
        ("az://container/x", {"account": "not an account"}),
        ("az://container/x", {"account_key": "secret"}),
        ("az://container/x", {"endpoint": "http://user:secret@x"}),
    ],
)
def test_wrong_uris_and_options_are_refused_at_once(uri, options):
    with pytest.raises(InvalidRequestError) as error:
        open_origin(OriginSpec(uri, options))
    assert error.value.hint
    assert "secret" not in str(error.value.to_dict())


@pytest.mark.parametrize(
    ("missing", "says"), [("obstore", "cached[az]"), ("google.auth.transport.urllib3", "cached[gs]")]
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(missing, says):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from cached.origins.registry import open_origin; from cached.origins.base import OriginSpec\n"
        "from cached.errors import InvalidRequestError\n"
        "try: open_origin(OriginSpec('gs://bucket/x')).list_objects()\n"
        "except InvalidRequestError as error: print(error, error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert says in done.stdout


def test_nothing_of_it_is_loaded_for_other_origins(tmp_path: Path):
    code = (
        "import sys; from cached.origins.registry import open_origin; from cached.origins.base import OriginSpec;"
        f"open_origin(OriginSpec('file://{tmp_path}')); open_origin(OriginSpec('https://host/x'));"
        "assert not {'obstore', 'google.auth', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
