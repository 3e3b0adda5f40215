"""Memory → GPU: a checkpoint in shared memory until all its tensors can be used on the GPU.

The limit is one cudaMemcpyAsync after another from pinned memory that is filled already: what the link carries. The
peers read the same checkpoint from files in the same kind of memory (tmpfs). All contestants are warm: processes,
libraries, CUDA and the ring's pinned memory are there before the clock starts, which then runs from the attach, or from
the opening of the files, until the device has everything.

Without a GPU only the filling side is measured (`fill`): how fast the ring's threads bring bytes into the ring, with a
device behind it that takes no time, for slots of 1 to 64 MiB; its limit is the same copies without a ring.
``--contests sweep`` measures other shapes of the ring on a GPU.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cached_client
from bench.checkpoints import dense, fp8, moe
from bench.contest import Contestant, hold
from bench.cpu import measured
from bench.options import Options
from bench.peer import PeerContestant
from bench.peers.fingerprint import fingerprint, fingerprint_of_files
from bench.results import Contest, PartResult, Requirement, Role, Sample, Unavailable
from bench.ring_fill import PlainCopy, RingFill
from bench.show import turn_printer
from cached_client import GpuOptions
from cached_client.gpu.options import MIB, Geometry
from tests.integration.harness import DaemonProcess

TITLE = "Memory → GPU"
DEVICE = "cuda:0"

_MODEL = "model"
_SHM = Path("/dev/shm")
_FILL_SLOTS_MIB = (1, 2, 4, 16, 64)
_SWEEP = [
    GpuOptions(threads=threads, slot_bytes=slot_mib * MIB, steps=steps)
    for threads in (2, 4, 6, 8)
    for slot_mib in (1, 2, 4, 8)
    for steps in (2, 3, 4)
]
_CHECKPOINTS = (
    ("upload", "a dense checkpoint of four files", dense),
    ("upload-moe", "a mixture of experts, more than 10,000 tensors", moe),
    ("upload-fp8", "a checkpoint in FP8", fp8),
)


def run(options: Options) -> PartResult:
    """`fill` anywhere; the others where torch can use a GPU: else the contestants of one of them say there is none."""
    result = PartResult("gpu", TITLE)
    if options.wants_contest("fill"):
        result.contests.append(_fill(options))
    for name, title, kind in _CHECKPOINTS if has_gpu() else _CHECKPOINTS[:1]:
        if options.wants_contest(name):
            with ExitStack() as stack:
                source = _in_memory(options, stack, name, kind)
                result.contests.append(_held(options, name, title, source, list(_contestants(options, stack, source))))
    if "sweep" in options.contests:
        with ExitStack() as stack:
            source = _in_memory(options, stack, "sweep", dense)
            shapes = [OursOnGpu(_shape(shape), _shape(shape), options, stack, source, gpu=shape) for shape in _SWEEP]
            result.contests.append(_held(options, "sweep", "shapes of the ring", source, shapes))
    result.requirements = requirements(result.contests)
    return result


def requirements(contests: Sequence[Contest]) -> list[Requirement]:
    """What has to be reached."""
    found = []
    for contest in contests:
        if contest.name.startswith("upload"):
            text = f"{contest.title}: GB/s to that of"
            found += [
                Requirement(f"{text} pinned memcpy", contest.ratio("cached", "pinned"), 0.85, unit="×"),
                Requirement(f"{text} InstantTensor", contest.ratio("cached", "instanttensor"), 1.0, unit="×"),
            ]
    return found


class OursOnGpu:
    """A new attach of a model that is in L1, and ``state_dict(device=…)``; the ring is there from the round before."""

    role = Role.OURS
    version = cached_client.__version__

    def __init__(
        self, name: str, title: str, options: Options, stack: ExitStack, source: Path, gpu: GpuOptions | None = None
    ) -> None:
        self.name, self.title = name, title
        self._options, self._stack, self._source = options, stack, source
        self._files = sorted(source.glob("*.safetensors"))
        self._gpu = gpu
        self._daemon: DaemonProcess | None = None
        self._runs = 0

    def prepare(self) -> None:
        """Starts the daemon, has it load the model, and loads it once, for CUDA and the ring."""
        need_gpu()
        if self._daemon is None:
            self._daemon = self._stack.enter_context(self._started())
            self.run()

    def run(self) -> Sample:
        """Raises AssertionError if what came is not the checkpoint."""
        import torch

        assert self._daemon is not None
        torch.cuda.synchronize()
        with cached_client.connect(str(self._daemon.socket)) as cache:
            cache.wait_ready(30)
            with measured((self._daemon.pid,)) as span:
                model = cache.attach(_MODEL)
                tensors = model.state_dict(device=DEVICE, gpu=self._gpu)
            with model:
                report = model.device_report
                assert report is not None
                assert report.path == "ring", report
        full = self._runs == 0
        self._runs += 1
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        views = ((name, _bytes_of(tensor)) for name, tensor in tensors.items())
        assert fingerprint(views, full=full) == fingerprint_of_files(self._files, full=full), "not the checkpoint"
        extra = {"threads": float(report.threads), "ring MiB": report.steps * report.threads * report.slot_bytes / MIB,
                 "ring wait s": report.ring_wait_s}  # fmt: skip
        return Sample(span.seconds, size_bytes, span.cpu_s, extra=extra)

    def close(self) -> None:
        """The daemon ends with the contest; the ring goes."""
        cached_client.gpu.release()

    def _started(self) -> DaemonProcess:
        size_bytes = sum(path.stat().st_size for path in self._files)
        short = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cached-gpu-")))
        daemon = DaemonProcess(
            self._options.folder / f"daemon-{self.name}-{self._source.name}",
            models={_MODEL: {"source": f"file://{self._source}", "tier": "hot"}},
            settings={
                "daemon": {"log_level": "info", "socket": str(short / "cached.sock")},
                "l1": {"capacity": f"{size_bytes * 2}B"},
                "l2": {"enabled": False},
                "http": {"listen": ""},
            },
        )
        daemon.socket, daemon.descriptor_socket = short / "cached.sock", short / "cached-fd.sock"
        return daemon


class PeerOnGpu(PeerContestant):
    """Only where there is a GPU."""

    def prepare(self) -> None:
        """Untimed."""
        need_gpu()
        super().prepare()


def has_gpu() -> bool:
    """Whether torch can use one."""
    import torch

    return torch.cuda.is_available()


def need_gpu() -> None:
    """Raises Unavailable."""
    if not has_gpu():
        raise Unavailable("no GPU that torch can use")


def _bytes_of(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())


def _shape(options: GpuOptions) -> str:
    return f"{options.threads}x{(options.slot_bytes or 0) // MIB}MiBx{options.steps}"


def _in_memory(options: Options, stack: ExitStack, name: str, kind: Any) -> Path:
    """The checkpoint in tmpfs, where the peers read it."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cached-bench-gpu-", dir=_SHM)))
    source = options.checkpoints.get(
        f"gpu-{name}", size_bytes=options.size_bytes, shard_bytes=max(1 << 20, options.size_bytes // 4), kind=kind
    )
    return Path(shutil.copytree(source, folder / name))


def _held(options: Options, name: str, title: str, source: Path, contestants: Sequence[Contestant]) -> Contest:
    size_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    contest = Contest(name, title[0].upper() + title[1:], [], size_bytes=size_bytes)
    chosen = [item for item in contestants if options.wants(item.name)]
    return hold(contest, chosen, rounds=options.rounds, memory_bytes=0, report=turn_printer(options.console))


def _contestants(options: Options, stack: ExitStack, source: Path) -> Iterator[Contestant]:
    files = sorted(source.glob("*.safetensors"))
    warm = options.checkpoints.get("gpu-warm", size_bytes=4 << 20, shard_bytes=4 << 20)
    paths = [str(path) for path in files]
    order = {"paths": paths, "warm_paths": [str(next(warm.glob("*.safetensors")))], "device": DEVICE}

    def peer(name: str, title: str, module: str, role: Role = Role.PEER) -> PeerContestant:
        return PeerOnGpu(
            name, title, python=options.peers_python, module=module, order=order, files=files, role=role,
            log=options.folder / f"{name}-{source.name}.log",
        )  # fmt: skip

    yield peer("pinned", "cudaMemcpyAsync from pinned memory (limit)", "pinned_gpu", Role.LIMIT)
    yield OursOnGpu("cached", "cached: attach and state_dict", options, stack, source)
    yield peer("instanttensor", "InstantTensor", "instant")
    yield peer("fastsafetensors", "fastsafetensors", "fastsafe")
    yield peer("runai", "runai-model-streamer", "runai")
    yield peer("safetensors", "safetensors load_file", "plain_gpu")


def _fill(options: Options) -> Contest:
    with ExitStack() as stack:
        source = _in_memory(options, stack, "fill", dense)
        files = sorted(source.glob("*.safetensors"))
        shapes = {slot_mib: Geometry(2, slot_mib * MIB, 3) for slot_mib in _FILL_SLOTS_MIB}
        contestants: list[Contestant] = [
            RingFill(f"ring-{slot_mib}", f"the ring, 3 steps × 2 threads × {slot_mib} MiB", shape, files)
            for slot_mib, shape in shapes.items()
        ]
        for slot_mib in (2, 64):
            title = f"memcpy by 2 threads from a fresh mapping, slots of {slot_mib} MiB"
            shape = shapes[slot_mib]
            contestants.append(PlainCopy(f"memcpy-{slot_mib}", title, "mapped", shape, files, Role.LIMIT))
        title = "memcpy by 2 threads, pages faulted in before, 2 MiB"
        contestants.append(PlainCopy("faulted", title, "faulted", shapes[2], files, Role.PEER))
        contestants.append(PlainCopy("read", "preadv by 2 threads, 2 MiB", "read", shapes[2], files, Role.PEER))
        contest = _held(options, "fill", "filling the ring, without a GPU", source, contestants)
        contest.note = "The device takes no time; each run maps the files afresh."
        return contest
