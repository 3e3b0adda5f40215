"""What tests of the whole share: a site with an S3 server, a counting proxy and a daemon; models; worker processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

import cached_client
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for
from tests.invariants import check_at_rest, check_stopped
from tests.servers import CountingProxy, Fault, S3Server

MB = 1_000_000
SERVE = (sys.executable, "-c", "import sys; from cached.cli.main import main; sys.exit(main())")
ROOT = Path(__file__).resolve().parent.parent.parent


def random_bytes(size_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


def safetensors(size_bytes: int, seed: int, *, tensors: int = 3) -> bytes:
    """A valid safetensors file of exactly ``size_bytes``: a few U8 tensors of random bytes."""
    header_bytes = 1024
    data = random_bytes(size_bytes - 8 - header_bytes, seed)
    step = len(data) // tensors
    ends = [*(step * number for number in range(1, tensors)), len(data)]
    table = {
        f"t{number}.weight": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    }
    header = json.dumps(table).encode().ljust(header_bytes)
    return struct.pack("<Q", header_bytes) + header + data


def model_files(*sizes_bytes: int, seed: int = 1) -> dict[str, bytes]:
    """A small model as on a hub: config, tokenizer, and one safetensors shard for each size."""
    files = {
        "config.json": json.dumps({"model_type": "test", "seed": seed}).encode(),
        "tokenizer.json": json.dumps({"version": "1.0", "seed": seed}).encode(),
    }
    if len(sizes_bytes) == 1:
        files["model.safetensors"] = safetensors(sizes_bytes[0], seed)
        return files
    weight_map = {}
    for number, size_bytes in enumerate(sizes_bytes, 1):
        path = f"model-{number:05}-of-{len(sizes_bytes):05}.safetensors"
        files[path] = safetensors(size_bytes, 100 * seed + number)
        weight_map[f"layer{number}"] = path
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def total_bytes(files: Mapping[str, bytes]) -> int:
    return sum(map(len, files.values()))


def chunk_ranges(size_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of each chunk of a file."""
    return [(at, min(CHUNK_BYTES, size_bytes - at)) for at in range(0, size_bytes, CHUNK_BYTES)]


def flip_byte(path: Path, offset_bytes: int) -> None:
    """Damages a file in place, as a failing memory or disk would."""
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)
        file.seek(offset_bytes)
        file.write(bytes([byte[0] ^ 0x20]))


@contextlib.contextmanager
def refused(reason: str) -> Iterator[dict[str, str]]:
    """The block must raise a CacheError of this reason; its fields, message and hint are in the dictionary after."""
    seen: dict[str, str] = {}
    with pytest.raises(cached_client.CacheError) as caught:
        yield seen
    error = caught.value
    assert error.reason == reason, f"{error.reason}: {error}"
    seen |= {**error.fields, "message": error.message, "hint": error.hint}


class Worker:
    """A worker process; leaving the context kills it, also when it is stopped."""

    def __init__(self, socket: Path, *arguments: str, module: str = "tests.integration.worker_process") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(socket), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        """Asks without waiting for the answer."""
        self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
        self._requests.flush()

    def receive(self) -> Any:
        """The next answer; raises what the worker raised."""
        line = self._answers.readline()
        assert line, f"the worker ended with {self._process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise cached_client.CacheError(answer["message"], reason=answer["error"], **_named(answer["fields"]))
        return answer["ok"]

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.receive()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _named(fields: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in fields.items() if key not in {"message", "hint", "reason"}}


@dataclass
class Site:
    """An S3 server behind a proxy that counts, and a daemon that knows models of it by its catalog.

    ``settings`` and ``models`` may be changed until ``start``; ``add`` publishes a model. ``close`` (the fixture does
    it) checks the invariants, unless ``check`` is false.
    """

    folder: Path
    server: S3Server
    proxy: CountingProxy
    bucket: str
    models: dict[str, Any] = field(default_factory=dict)
    tenants: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    check: bool = True
    around: tuple[str, ...] = ()
    """A program, with its arguments, that the daemon is started by."""
    _daemon: DaemonProcess | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # What it is made of.

    def upload(self, name: str, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            self.put(f"{name}/{path}", data)

    def put(self, key: str, data: bytes) -> None:
        seed = getattr(self.server, "seed", self.server.put)
        seed(self.bucket, key, data)

    def uri(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def add(self, name: str, files: dict[str, bytes], **entry: Any) -> dict[str, bytes]:
        """Uploads a model and puts it into the catalog (that of a running daemon too); its files."""
        self.upload(name, files)
        return self.know(name, files, **entry)

    def know(self, name: str, files: dict[str, bytes], **entry: Any) -> dict[str, bytes]:
        """Puts a model that was uploaded already into the catalog, or changes its entry."""
        self.files[name] = files
        options = {"endpoint_url": self.proxy.endpoint_url}
        self.models[name] = {"source": self.uri(name), "origin": options, **entry}
        if self._daemon is not None:
            self._daemon.write_catalog(self.models)
        return files

    def reload_catalog(self) -> None:
        """Writes the catalog as it is in ``models`` and waits until the daemon has it."""
        before = len(self.daemon.log_events("catalog.loaded"))
        self.daemon.write_catalog(self.models)
        self.daemon.signal(signal.SIGHUP)
        wait_for(lambda: len(self.daemon.log_events("catalog.loaded")) > before, "the catalog to be loaded")

    @property
    def daemon(self) -> DaemonProcess:
        """Made with the first use, not started."""
        if self._daemon is None:
            self._daemon = DaemonProcess(
                self.folder / "d", models=self.models, tenants=self.tenants, settings=self.settings,
                environment=self.environment(),
                command=(*self.around, *SERVE) if self.around[:1] != (sys.executable,) else self.around,
            )  # fmt: skip
            self._stack.callback(self._daemon.close)
        return self._daemon

    def started_by(self, *around: str) -> None:
        """The next daemon, on the same state, is started by this program, or is it if it is Python's.

        The one before must have ended.
        """
        assert self._daemon is None or not self._daemon.is_running
        self.around, self._daemon = around, None

    def environment(self) -> dict[str, str]:
        return self.server.env() | {"CACHED_S3_ENDPOINT_URL": self.proxy.endpoint_url, "PYTHONPATH": str(ROOT)}

    def start(self) -> DaemonProcess:
        return self.daemon.start()

    def close(self) -> None:
        self.proxy.heal()
        try:
            if self.check and self._daemon is not None and self._daemon.is_running:
                check_at_rest(self._daemon, leases=None)
                pid = self._daemon.pid
                assert self._daemon.terminate() == 0, self._daemon.log()
                check_stopped(self._daemon, pid)
            else:
                self._show_log()
        except BaseException:
            self._show_log()
            raise
        finally:
            self._stack.close()

    def _show_log(self) -> None:
        if self._daemon is not None:
            sys.stderr.write(f"--- log of the daemon ---\n{self._daemon.log(all_starts=True)[-30000:]}\n")

    # What one does with it.

    def cache(self) -> cached_client.Cache:
        """A new connection; use it as a context manager."""
        return cached_client.connect(str(self.daemon.socket))

    def pull(self, ref: str, **options: Any) -> list[cached_client.PullProgress]:
        with self.cache() as cache:
            return list(cache.pull(ref, timeout_s=60, **options))

    def begin(self, ref: str, **options: Any) -> None:
        """Starts a pull that goes on by itself."""
        assert self.pull(ref, wait=False, **options)[-1].phase == "accepted"

    def attach(self, ref: str) -> Any:
        """A model attached in this process, within a context that ends the connection too."""
        return _attached(self, ref)

    def worker(self) -> Worker:
        """A worker process; ended with the site at the latest."""
        return self._stack.enter_context(Worker(self.daemon.socket))

    def check_served(self, name: str, ref: str = "") -> cached_client.LoadReport:
        """Attaches and compares every byte with what was published; how it came into memory."""
        files = self.files[name]
        with self.attach(ref or name) as model:
            report: cached_client.LoadReport = model.wait(60)
            assert set(model.files) == set(files)
            for path, data in files.items():
                assert model.view(path) == data, f"{path} of {name} differs from its source"
        return report

    def describe(self, ref: str) -> pb.DescribeResponse:
        with self.daemon.stub() as stub:
            return stub.Describe(pb.DescribeRequest(ref=ref))

    def summary(self, name: str) -> cached_client.ModelSummary:
        with self.cache() as cache:
            return next(item for item in cache.list() if item.name == name)

    def evict(self, ref: str, level: str = "l1") -> pb.EvictResponse:
        with self.rpc() as stub:
            return stub.Evict(pb.EvictRequest(ref=ref, level={"l1": pb.LEVEL_L1, "l2": pb.LEVEL_L2}.get(level)))

    @contextlib.contextmanager
    def rpc(self) -> Iterator[Any]:
        """The stub; its errors are CacheErrors."""
        import grpc

        from cached_client.errors import from_rpc_error

        with self.daemon.stub() as stub:
            try:
                yield stub
            except grpc.RpcError as error:
                raise from_rpc_error(error, str(self.daemon.socket)) from error

    def verify(self, ref: str = "", *, repair: bool = False) -> tuple[list[pb.Damage], pb.VerifyResponse]:
        """The damage that was found, and the last message."""
        with self.rpc() as stub:
            answers = list(stub.Verify(pb.VerifyRequest(ref=ref, repair=repair)))
        assert answers[-1].finished
        return [answer.damage for answer in answers if answer.HasField("damage")], answers[-1]

    def level(self, name: str) -> pb.LevelStats:
        wanted = {"l1": pb.LEVEL_L1, "l2": pb.LEVEL_L2}[name]
        return next(level for level in self.daemon.stats().levels if level.level == wanted)

    def leases(self) -> list[pb.Lease]:
        with self.daemon.stub() as stub:
            return list(stub.ListLeases(pb.ListLeasesRequest()).leases)

    # Where its bytes are.

    def segment(self, name: str, path: str) -> Path:
        """The L1 segment of a file of a model. It has its name a little after the model could be used."""
        end = f".blob.{sha256(self.files[name][path])}"
        found = wait_for(lambda: [item for item in self.daemon.segments() if item.name.endswith(end)], f"{path} in L1")
        return found[0]

    def segments(self, kind: str) -> list[Path]:
        """Segments of a kind: blob, ingest, withdrawn or pool."""
        return [item for item in self.daemon.segments() if item.name.split(".")[2] == kind]

    def l2_blob(self, name: str, path: str) -> Path:
        """The L2 file of a file of a model."""
        digest = sha256(self.files[name][path])
        return self.daemon.l2_dir / "blobs" / digest[:2] / digest

    def ranges(self, path: str = "") -> list[str]:
        """The byte ranges asked of the origin so far, of objects whose name has ``path``."""
        return [item.range for item in self.proxy.gets(path)]

    def hold(self, path: str, **settings: Any) -> Fault:
        """Holds requests of an object after some bytes; see Fault."""
        return self.proxy.inject("hold", path=path, **settings)


@contextlib.contextmanager
def _attached(site: Site, ref: str) -> Iterator[cached_client.Model]:
    with site.cache() as cache, cache.attach(ref, timeout_s=60) as model:
        yield model
