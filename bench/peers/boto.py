"""boto3's ``download_file`` into files on tmpfs, which are then mapped; its own transfer manager, or the CRT's."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from bench.peers.fingerprint import tensors_of
from bench.peers.protocol import Order, serve


class Boto:
    """Order: ``bucket``, ``objects`` and ``warm_objects`` ([key, size]…), ``endpoint_url``, ``ca_bundle``, ``folder``
    (on tmpfs), ``client`` (classic or crt), ``threads`` (for all objects together)."""

    packages = ("boto3",)

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
        if order["client"] == "crt":
            self.packages = ("boto3", "awscrt")

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
        config = TransferConfig(
            preferred_transfer_client=self._order["client"],
            max_concurrency=max(1, self._order["threads"] // len(objects)),
        )
        paths = [self._folder / key.replace("/", "_") for key, _ in objects]

        def download(key: str, path: Path) -> None:
            self._client.download_file(self._order["bucket"], key, str(path), Config=config)

        with ThreadPoolExecutor(len(objects)) as pool:
            list(pool.map(download, [key for key, _ in objects], paths))
        return paths


if __name__ == "__main__":
    serve(Boto)
