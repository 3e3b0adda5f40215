"""s3torchconnector: whole objects through its reader, several in parallel, into buffers that are safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from s3torchconnector import S3ReaderConstructor
from s3torchconnector._s3client import S3Client, S3ClientConfig

from bench.peers.fingerprint import tensors_of
from bench.peers.protocol import Order, serve

_READERS = {
    "sequential": S3ReaderConstructor.sequential,
    "ranged": lambda: S3ReaderConstructor.range_based(buffer_size=0),
}


class S3Torch:
    """Order: ``bucket``, ``objects`` and ``warm_objects`` ([key, size]…), ``endpoint_url``, ``reader``, ``threads``.

    ``sequential`` reads each object by one request of the CRT, which fetches parts in parallel; ``ranged`` reads ranges
    of ``range_bytes`` straight into the destination.
    """

    packages = ("s3torchconnector",)

    def __init__(self, order: Order) -> None:
        self._order = order
        config = S3ClientConfig(
            throughput_target_gbps=order.get("target_gbps", 100.0), force_path_style=True, part_size=8 << 20
        )
        self._client = S3Client(region="us-east-1", endpoint=order["endpoint_url"], s3client_config=config)

    def warm_up(self) -> None:
        self._read_all(self._order["warm_objects"])

    def load(self) -> list[memoryview]:
        return self._read_all(self._order["objects"])

    def tensors(self, loaded: list[memoryview]) -> Iterable[tuple[str, memoryview]]:
        for file in loaded:
            yield from tensors_of(file)

    def clear(self) -> None:
        """Nothing is left."""

    def _read_all(self, objects: list[tuple[str, int]]) -> list[memoryview]:
        with ThreadPoolExecutor(self._order["threads"]) as pool:
            if self._order["reader"] == "sequential":
                return list(pool.map(lambda item: self._read_whole(*item), objects))
            return self._read_ranges(pool, objects)

    def _read_whole(self, key: str, size_bytes: int) -> memoryview:
        """Batch by batch from the stream under its reader: the reader's own buffer would be one more copy."""
        target = memoryview(bytearray(size_bytes))
        at = 0
        for batch in self._client._get_object_stream(self._order["bucket"], key):
            target[at : at + len(batch)] = batch
            at += len(batch)
        return target

    def _read_ranges(self, pool: ThreadPoolExecutor, objects: list[tuple[str, int]]) -> list[memoryview]:
        targets = [memoryview(bytearray(size_bytes)) for _, size_bytes in objects]
        step = self._order["range_bytes"]
        jobs = [
            (key, target[start : start + step], start)
            for (key, _), target in zip(objects, targets, strict=True)
            for start in range(0, len(target), step)
        ]
        list(pool.map(lambda job: self._read_range(*job), jobs))
        return targets

    def _read_range(self, key: str, target: memoryview, start: int) -> None:
        at = 0
        stream = self._client._get_object_stream(self._order["bucket"], key, start=start, end=start + len(target))
        for batch in stream:
            target[at : at + len(batch)] = batch
            at += len(batch)


if __name__ == "__main__":
    serve(S3Torch)
