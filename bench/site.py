"""What a benchmark runs against: a real S3 server and real daemons, below one folder, gone when it is left."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config

from bench.results import Unavailable
from cached.checksum import crc64nvme
from tests.integration.harness import DaemonProcess
from tests.servers import ACCESS_KEY, SECRET_KEY, RcloneS3

BUCKET = "models"
_READ_BYTES = 8 << 20
_SERVE = "import sys; from cached.cli.main import main; sys.exit(main())"
_UNIT = Path(__file__).resolve().parents[1] / "systemd" / "cached.service"
_HUGE_SHM = 'mount -t tmpfs -o huge=advise,mode=1777 none /dev/shm || exit 99; exec "$0" "$@"'


class Site:
    """A context manager. ``s3`` is the server, of HTTP or of TLS; daemons are started as they are asked for."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.s3 = self._stack.enter_context(RcloneS3(folder / "s3", tls=tls, tls_folder=folder / "tls"))
        try:
            self.s3.create_bucket(BUCKET)
        except BaseException:
            self._stack.close()
            raise
        self._daemons: dict[str, DaemonProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # Objects.

    def push(self, name: str, source: Path) -> None:
        """Uploads a checkpoint, each object in one piece with its CRC64-NVME, which the server keeps.

        ``cached push`` sends large files in parts, and of those this server forgets the checksum.
        """
        for path in sorted(source.iterdir()):
            value = 0
            with path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    value = crc64nvme(data, value)
                file.seek(0)
                encoded = base64.b64encode(value.to_bytes(8, "big")).decode()
                key = f"{name}/{path.name}"
                self.s3.client().put_object(Bucket=BUCKET, Key=key, Body=file, ChecksumCRC64NVME=encoded)
        os.sync()  # what is still to be written to disk would disturb what is measured

    def objects(self, name: str) -> list[tuple[str, int]]:
        """Key and size of each weight file."""
        folder = self.s3.folder / BUCKET / name
        return [(f"{name}/{path.name}", path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))]

    def presigned(self, key: str) -> str:
        """A URL that anybody may GET for an hour."""
        parameters = {"Bucket": BUCKET, "Key": key}
        client = boto3.client(
            "s3", endpoint_url=self.s3.endpoint_url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY, config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )  # fmt: skip
        return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=3600))

    def by_crc(self, name: str) -> dict[str, Any]:
        """Catalog entry of a pushed checkpoint that leaves the check to the origin's checksum."""
        return {"source": f"s3://{BUCKET}/{name}", "origin": self.s3.options()}

    def by_sha256(self, name: str, source: Path) -> dict[str, Any]:
        """Catalog entry with the SHA-256 of each file."""
        return {**self.by_crc(name), "sha256": {path.name: _sha256_of(path) for path in sorted(source.iterdir())}}

    # Daemons.

    def daemon(
        self,
        name: str,
        *,
        models: Mapping[str, Any],
        settings: Mapping[str, Mapping[str, Any]],
        command: Sequence[str] = (sys.executable, "-c", _SERVE),
    ) -> DaemonProcess:
        """The daemon of that name, started if it is not; it sees this server, and nothing of the developer's own.

        Quiet logs, no HTTP page, movers that do not end between rounds; ``settings`` go over that.
        """
        if name not in self._daemons:
            merged: dict[str, dict[str, Any]] = {
                "daemon": {"log_level": "info"},
                "transfer": {"movers": 0, "idle_timeout_s": 3600.0},
                "http": {"listen": ""},
            }
            for section, values in settings.items():
                merged.setdefault(section, {}).update(values)
            # A socket's path is short; the temporary folder's may not be.
            short = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"cached-{name[:8]}-")))
            merged["daemon"] = {"socket": str(short / "cached.sock"), **merged["daemon"]}
            daemon = DaemonProcess(
                self.folder / f"daemon-{name}", models=models, settings=merged, environment=self.s3.env(),
                command=command,
            )  # fmt: skip
            daemon.socket = short / "cached.sock"
            daemon.descriptor_socket = short / "cached-fd.sock"
            self._daemons[name] = self._stack.enter_context(daemon)
        return self._daemons[name]


def huge_page_command() -> tuple[str, ...]:
    """Starts a daemon that has a /dev/shm with huge pages to itself. Raises Unavailable where that is not permitted."""
    command: tuple[str, ...] = ("unshare", "--mount", "sh", "-c", _HUGE_SHM)
    if os.geteuid() != 0:
        command = ("unshare", "--user", "--map-root-user", *command[1:])
    if shutil.which("unshare") is None:
        raise Unavailable("needs unshare(1) of util-linux")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise Unavailable(f"a mount namespace with huge pages is not permitted: {tried.stderr.strip()[:200]}")
    return (*command, sys.executable, "-c", _SERVE)


def unit_command() -> tuple[str, ...]:
    """Starts a daemon with the priority that its systemd unit gives it, where that is permitted."""
    found = re.search(r"^Nice=(\S+)$", _UNIT.read_text(), re.MULTILINE)
    niced = ("nice", "-n", found[1]) if found and os.geteuid() == 0 else ()
    return (*niced, sys.executable, "-c", _SERVE)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
