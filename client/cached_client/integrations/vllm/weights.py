"""One rank's load of one model: attach, hand the tensors over as they arrive, and say what it took.

Knows nothing of vLLM. Every rank does this by itself: the daemon downloads once and holds one copy, which all map.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cached_client
from cached_client.errors import CacheError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import torch

    from cached_client.attach import Model
    from cached_client.cache import Cache
    from cached_client.integrations.vllm.options import LoaderOptions
    from cached_client.integrations.vllm.start import LoadStart

_SAFETENSORS = ".safetensors"


@dataclass(slots=True)
class LoadTimings:
    """What a load took. Seconds; those within it add up to ``total_s``, but for ``first_tensor_s``.

    Attributes:
        ref: ``NAME@REVISION`` of what was loaded.
        rank: ``RANK/RANKS``.
        from_level: where the cache had most of it: ``l1`` memory, ``l2`` disk, ``l3`` the origin. Empty: not complete.
        device: where the tensors were handed over.
        path: ``views`` (of shared memory), ``ring``, ``plain`` or ``registered`` (see `DeviceReport`).
        tensors, tensor_bytes: what was handed over.
        attach_s: until the files were mapped.
        first_tensor_s: from the start until the first tensor was handed over.
        wait_s: waiting for the next tensor: for bytes that had not arrived, or for the device.
        engine_s: what the engine did with the tensors, between them.
        total_s: all of it.
        fallbacks: what else was done instead, and why.
    """

    ref: str
    rank: str = "0/1"
    from_level: str = ""
    device: str = "cpu"
    path: str = "views"
    tensors: int = 0
    tensor_bytes: int = 0
    attach_s: float = 0.0
    first_tensor_s: float = 0.0
    wait_s: float = 0.0
    engine_s: float = 0.0
    total_s: float = 0.0
    fallbacks: tuple[str, ...] = ()

    @property
    def gb_per_s(self) -> float:
        """Bytes handed over by all of the time, engine included, in 10^9 bytes a second."""
        return self.tensor_bytes / self.total_s / 1e9 if self.total_s else 0.0

    def line(self) -> str:
        """For a log: ``key=value``, in one line."""
        values = {
            "model": self.ref, "rank": self.rank, "level": self.from_level, "device": self.device, "path": self.path,
            "tensors": self.tensors, "bytes": self.tensor_bytes, "seconds": f"{self.total_s:.3f}",
            "gb_per_s": f"{self.gb_per_s:.2f}", "attach_s": f"{self.attach_s:.3f}",
            "first_tensor_s": f"{self.first_tensor_s:.3f}", "wait_s": f"{self.wait_s:.3f}",
            "engine_s": f"{self.engine_s:.3f}", "fallbacks": len(self.fallbacks),
        }  # fmt: skip
        told = " ".join(f"{key}={value}" for key, value in values.items())
        return f"{told} ({'; '.join(self.fallbacks)})" if self.fallbacks else told


class WeightLoad:
    """A load, from the connection to the last tensor; use `tensors` once.

    With ``options.hold`` its lease is held on afterwards, until `close`. ``start`` is told of the model when
    it is loaded.
    """

    def __init__(
        self, options: LoaderOptions, ref: str, *, client_name: str, rank: str, start: LoadStart | None = None
    ) -> None:
        self.timings: LoadTimings = LoadTimings(ref, rank)
        self._options = options
        self._ref = ref
        self._client_name = client_name
        self._start = start
        self._cache: Cache | None = None
        self._model: Model | None = None

    @property
    def ref(self) -> str:
        """``NAME@REVISION`` once it is attached."""
        return self.timings.ref

    def tensors(
        self, device: str | torch.device | None, skip: Callable[[str], bool] | None = None
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yields ``(name, tensor)`` in the order of arrival, less those whose name ``skip`` tells to leave out.

        Views of shared memory without ``device``, else copies there. Ends normally only once the model is complete and
        was checked. Raises CacheError. The lease ends with it, however it ends; held on is one that ended normally.
        """
        timings, began_s = self.timings, time.monotonic()
        kept = False
        try:
            model = self._attach()
            timings.attach_s = time.monotonic() - began_s
            options = self._options
            left_s = None if options.timeout_s is None else max(0.0, options.timeout_s - timings.attach_s)
            waited_s = time.monotonic()
            names = None if skip is None else [name for name in model.names(left_s) if not skip(name)]
            for name, tensor in model.stream(device, names, left_s, gpu=options.gpu):
                now_s = time.monotonic()
                timings.wait_s += now_s - waited_s
                if not timings.tensors:
                    timings.first_tensor_s = now_s - began_s
                timings.tensors += 1
                timings.tensor_bytes += tensor.numel() * tensor.element_size()
                yield name, tensor
                del tensor
                waited_s = time.monotonic()
                timings.engine_s += waited_s - now_s
            timings.wait_s += time.monotonic() - waited_s
            self._note(model, device)
            kept = options.hold
        finally:
            timings.total_s = time.monotonic() - began_s
            if not kept:
                self.close()

    def close(self) -> None:
        """Ends the lease, if it is held. Idempotent; what was handed over stays valid."""
        cache, self._cache, self._model = self._cache, None, None
        if cache is not None:
            cache.close()

    def _attach(self) -> Model:
        options = self._options
        self._cache = cached_client.connect(options.socket or None)
        self._cache.wait_ready(options.daemon_timeout_s)
        model = self._cache.attach(
            self._ref,
            source=options.source,
            timeout_s=options.timeout_s,
            wait=options.wait,
            client_name=self._client_name,
            keep_alive_s=options.keep_alive_s,
        )
        self._model = model
        self.timings.ref = f"{model.name}@{model.revision}"
        if not any(path.endswith(_SAFETENSORS) for path in model.files):
            raise InvalidRequestError(
                f"{self.timings.ref} has no safetensors files",
                hint="convert the checkpoint to safetensors, or load its directory with another --load-format",
                value=self._ref,
            )
        return model

    def _note(self, model: Model, device: str | torch.device | None) -> None:
        timings, report, copied = self.timings, model.report, model.device_report
        timings.from_level = report.from_level if report is not None else ""
        if device is not None:
            timings.device = str(device)
        if device is not None and copied is not None:
            timings.path = copied.path
            timings.fallbacks += copied.fallbacks
        if self._start is not None:
            self._start.loaded(model)


def pull(options: LoaderOptions, ref: str) -> str:
    """Brings a model into the cache's memory without loading it; returns ``NAME@REVISION``. Raises CacheError."""
    with cached_client.connect(options.socket or None) as cache:
        cache.wait_ready(options.daemon_timeout_s)
        done = ""
        for progress in cache.pull(ref, source=options.source, timeout_s=options.timeout_s):
            done = f"{progress.name}@{progress.revision}"
        return done


def may_fall_back(error: CacheError) -> bool:
    """Whether another way to the same weights may be taken: not round a mistake, and not round damaged content."""
    from cached_client.errors import IntegrityError

    return not isinstance(error, InvalidRequestError | IntegrityError)
