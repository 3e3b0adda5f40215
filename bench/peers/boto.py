"""boto3's ``download_file`` into files on tmpfs, which are then mapped; its own transfer manager, or the CRT's."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from s3transfer.crt import (
    BotocoreCRTCredentialsWrapper,
    BotocoreCRTRequestSerializer,
    CRTTransferManager,
    create_s3_crt_client,
)

from bench.peers.fingerprint import tensors_of
from bench.peers.protocol import Order, serve


class Boto:
    """Order: ``bucket``, ``objects`` and ``warm_objects`` ([key, size]…), ``endpoint_url``, ``ca_bundle``, ``folder``
    (on tmpfs), ``client`` (classic or crt), ``threads`` (for all objects together)."""

    packages = ("boto3", "s3transfer", "awscrt")

    def __init__(self, order: Order) -> None:
        self._order = order
        self._folder = Path(order["folder"])
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=order["endpoint_url"],
            verify=order.get("ca_bundle") or None,
            config=Config(
                s3={"addressing_style": "path"},
                max_pool_connections=64,
                response_checksum_validation="when_required",
            ),
        )
        self._crt = self._crt_client() if order["client"] == "crt" else None

    def warm_up(self) -> None:
        self._download(self._order["warm_objects"])

    def load(self) -> list[Path]:
        return self._download(self._order["objects"])

    def tensors(self, loaded: list[Path]) -> Iterable[tuple[str, memoryview]]:
        for path in loaded:
            with path.open("rb") as file:
                yield from tensors_of(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))

    def clear(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()

    def _download(self, objects: list[tuple[str, int]]) -> list[Path]:
        paths = [self._folder / key.replace("/", "_") for key, _ in objects]

        if self._crt is None:
            self._download_classic(objects, paths)
        else:
            with CRTTransferManager(*self._crt) as manager:  # leaving it waits until the files have their names
                futures = [
                    manager.download(self._order["bucket"], key, str(path))
                    for (key, _), path in zip(objects, paths, strict=True)
                ]
                for future in futures:
                    future.result()
        return paths

    def _download_classic(self, objects: list[tuple[str, int]], paths: list[Path]) -> None:
        threads = max(1, self._order["threads"] // len(objects))
        config = TransferConfig(preferred_transfer_client="classic", max_concurrency=threads)

        def download(key: str, path: Path) -> None:
            self._client.download_file(self._order["bucket"], key, str(path), Config=config)

        with ThreadPoolExecutor(len(objects)) as pool:
            list(pool.map(download, [key for key, _ in objects], paths))

    def _crt_client(self) -> tuple[Any, BotocoreCRTRequestSerializer]:
        """As boto3 makes it for ``preferred_transfer_client="crt"``, which knows TLS and AWS's own addresses only."""
        session = botocore.session.get_session()
        url = self._order["endpoint_url"]
        client = create_s3_crt_client(
            "us-east-1",
            BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider(),
            use_ssl=url.startswith("https:"),
            verify=self._order.get("ca_bundle") or None,
        )
        path_style = Config(s3={"addressing_style": "path"})
        settings = {"region_name": "us-east-1", "endpoint_url": url, "config": path_style}
        return client, BotocoreCRTRequestSerializer(session, settings)


if __name__ == "__main__":
    serve(Boto)
