"""LoRA adapters from the cache: from a name to a directory that stays while it is used. Knows nothing of vLLM."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client._proto import cached_pb2 as pb
from cached_client.cache import Cache, connect
from cached_client.errors import CacheError, FormatError, InvalidRequestError, NotFoundError
from cached_client.integrations.vllm.naming import name_of, pinned_ref
from cached_client.integrations.vllm.staging import stage

if TYPE_CHECKING:
    from cached_client.attach import Model

_log = logging.getLogger("vllm.cached")

_CONFIG = "adapter_config.json"


class Adapter:
    """An adapter that is in memory, and its directory. Both stay until the object is dropped; there is no close.

    Engines read adapters again at any time, and do not say when they have done so for the last time.
    """

    def __init__(self, model: Model) -> None:
        self.ref: str = f"{model.name}@{model.revision}"
        self._model = model
        directory = model.directory
        if directory is None or not all(os.access(directory / path, os.R_OK) for path in model.files):
            # A container with only the sockets sees no directory, or links that lead nowhere; others may not read.
            folder = Path(tempfile.mkdtemp(prefix="cached-lora-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            directory = stage(model, folder, weights=True)
        self.directory: Path = directory


class AdapterSource:
    """Finds adapters in the cache by name. Any thread may use it."""

    def __init__(self, socket: str | None = None, timeout_s: float = 300.0) -> None:
        """``timeout_s`` is for each adapter, its download included. Connects with the first use."""
        self._socket = socket
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._cache: Cache | None = None

    def find(self, name: str, base_path: str) -> Adapter | None:
        """The adapter of that name, for the base model at ``base_path``, in memory; None if the cache has none.

        Only what the catalog says is an adapter (``base``), and of this base where ``base_path`` tells which that is:
        whoever may name a model in a request must not have the host load any other. Raises CacheError if the daemon
        does not answer or cannot load it, and FormatError if what it has is no adapter.
        """
        cache = self._connected()
        try:
            request = pb.DescribeRequest(ref=name)
            described = cache.connection.call(cache.connection.stub.Describe, request, timeout_s=self._timeout_s)
        except (NotFoundError, InvalidRequestError):
            return None
        base = described.summary.base
        served = name_of(pinned_ref(base_path))
        if not base or (served and served != base):
            _log.warning(
                "cached: %s is not served as a LoRA adapter: %s", name,
                f"it is one of {base}, and this is {served}" if base else "the catalog names no `base` for it",
            )  # fmt: skip
            return None
        model = cache.attach(name, timeout_s=self._timeout_s, wait=True, client_name=f"vllm LoRA for {base}")
        try:
            _check(model)
            return Adapter(model)
        except BaseException:
            model.close()
            raise

    def _connected(self) -> Cache:
        with self._lock:
            if self._cache is None:
                self._cache = connect(self._socket)
            return self._cache


def _check(model: Model) -> None:
    """Raises FormatError if the model has no configuration of a LoRA adapter."""
    try:
        kind = json.loads(model.read(_CONFIG)).get("peft_type")
    except (CacheError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{model.name} is no LoRA adapter: its {_CONFIG} cannot be read",
            hint="the catalog names a `base` for it; the folder of an adapter holds what PEFT saves",
            path=_CONFIG,
        ) from error
    if kind != "LORA":
        raise FormatError(f"{model.name} is an adapter of the type {kind!r}, not LORA", path=_CONFIG)
