"""Real S3 servers for tests: rclone (checks signatures, quick) and moto (checksums, versions, If-Match).

``with RcloneS3(folder) as server:`` gives ``endpoint_url``, ``env()``, ``spec(uri)``, ``put(bucket, key, data)``. Put a
``CountingProxy(server.endpoint_url)`` before either to count requests and to inject faults.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import boto3
import pytest
import rclone_api
from botocore.config import Config
from botocore.exceptions import ClientError

from cached.origins.base import OriginSpec
from tests.fault_proxy import ACCESS_KEY, SECRET_KEY, CountingProxy, Fault, SeenRequest

__all__ = [
    "ACCESS_KEY",
    "SECRET_KEY",
    "CountingProxy",
    "Fault",
    "MotoS3",
    "RcloneS3",
    "S3Server",
    "SeenRequest",
    "s3_env",
]


class S3Server:
    """A running S3 server in a process of its own; a context manager. ``close`` is idempotent."""

    name = ""

    def __init__(self, command: list[str], announced: str, env: Mapping[str, str] | None = None) -> None:
        self._log: list[str] = []
        self._url = ""
        self._up = threading.Event()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_log, args=(announced,))
        self._reader.start()
        try:
            self._up.wait(30)
        except BaseException:
            self.close()
            raise
        if not self._url:
            self.close()
            raise RuntimeError(f"{command[0]} did not start:\n{self.log}")
        self._client: Any = None

    @property
    def endpoint_url(self) -> str:
        return self._url

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        return "".join(self._log)

    def env(self) -> dict[str, str]:
        """The AWS environment of a process that may read and write here. No endpoint: see ``options``."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def options(self) -> dict[str, str]:
        """Options of an OriginSpec that reach this server."""
        return {"endpoint_url": self.endpoint_url}

    def spec(self, uri: str, **options: str) -> OriginSpec:
        return OriginSpec(uri, {**self.options(), **options})

    def client(self) -> Any:
        """A boto3 client with the server's credentials; retries, unlike the code under test."""
        if self._client is None:
            self._client = boto3.Session(
                aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name="us-east-1"
            ).client("s3", endpoint_url=self.endpoint_url, verify=self.ca_bundle or None, config=_CLIENT_CONFIG)
        return self._client

    ca_bundle = ""

    def create_bucket(self, bucket: str) -> None:
        self.client().create_bucket(Bucket=bucket)

    def put(self, bucket: str, key: str, data: bytes, **extra: Any) -> str:
        """Stores an object (``extra`` goes to PutObject) and returns its ETag."""
        return str(self.client().put_object(Bucket=bucket, Key=key, Body=data, **extra)["ETag"])

    def delete(self, bucket: str, key: str) -> None:
        self.client().delete_object(Bucket=bucket, Key=key)

    def get(self, bucket: str, key: str) -> bytes:
        with self.client().get_object(Bucket=bucket, Key=key)["Body"] as body:
            return bytes(body.read())

    def pause(self) -> None:
        """Stops the server's process: connections stay open and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if getattr(self, "_client", None) is not None:
            self._client.close()
            self._client = None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stderr:
            self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_log(self, announced: str) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
            match = re.search(announced, line)
            if match and not self._url:
                self._url = match[1].rstrip("/")
                self._up.set()
        self._up.set()


class RcloneS3(S3Server):
    """``rclone serve s3`` of a folder: its sub-folders are buckets. Checks SigV4; ranges are answered with 200.

    Files put into ``folder`` before the start, or with ``seed``, are served too. With ``tls`` PutObject of boto3 is
    refused (411), so ``put`` writes files there.
    """

    name = "rclone"

    def __init__(self, folder: Path, *, tls: bool = False, tls_folder: Path | None = None) -> None:
        self.folder = folder
        self.tls = tls
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(next(iter(rclone_api.__path__))) / "bin" / "rclone"), "serve", "s3", "--config", os.devnull,
            "--addr", "127.0.0.1:0", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", "24h", str(folder),
        ]  # fmt: skip
        if tls:
            certificate, key = make_certificate(tls_folder or folder.parent)
            command += ["--cert", str(certificate), "--key", str(key)]
            self.ca_bundle = str(certificate)
        super().__init__(command, r"Starting s3 server on \[(https?://[^\]]+)\]")

    def options(self) -> dict[str, str]:
        return {**super().options(), **({"ca_bundle": self.ca_bundle} if self.ca_bundle else {})}

    def put(self, bucket: str, key: str, data: bytes, **extra: Any) -> str:
        if not self.tls:
            return super().put(bucket, key, data, **extra)
        self.seed(bucket, key, data)
        return str(self.client().head_object(Bucket=bucket, Key=key)["ETag"])

    def seed(self, bucket: str, key: str, data: bytes) -> Path:
        """Writes an object's file directly; returns its path once the object is served."""
        self.seed_many(bucket, {key: data})
        return self.folder / bucket / key

    def seed_many(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """As ``seed``. New files are seen once rclone has dropped its cache of folders, which also holds the ETags:
        without that cache each request would hash the whole object."""
        for key, data in objects.items():
            path = self.folder / bucket / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.client().list_buckets()  # one that has only begun to listen may not hear signals yet, and end by this one
        self._process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + 30
        for key, data in objects.items():
            while self._size_of(bucket, key) != len(data):
                assert time.monotonic() < deadline_s, f"rclone does not serve {bucket}/{key}"
                time.sleep(0.01)

    def _size_of(self, bucket: str, key: str) -> int | None:
        try:
            return int(self.client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError:
            return None


class MotoS3(S3Server):
    """``moto_server``: slow, signatures unchecked; knows checksums, versions, If-Match, GetObjectAttributes."""

    name = "moto"

    def __init__(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        super().__init__(command, r"Running on (http://[0-9.:]+)", {"PYTHONWARNINGS": "ignore"})


_CLIENT_CONFIG = Config(
    s3={"addressing_style": "path"},
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)


def make_certificate(folder: Path, *, authority: bool = True) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and localhost, and its key: paths of two PEM files.

    ``authority``: it says of itself that it is one, which some clients do not take from a server.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@contextlib.contextmanager
def s3_env(server: S3Server, **more: str) -> Iterator[None]:
    """This process's AWS environment is the server's, within the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.env(), **more}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneS3]:
    """One rclone server for the whole run; use a bucket of your own."""
    with RcloneS3(tmp_path_factory.mktemp("rclone") / "buckets") as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[MotoS3]:
    """One moto server for the whole run; use a bucket of your own."""
    with MotoS3() as server:
        yield server
