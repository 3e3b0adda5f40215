# pyright: reportMissingImports=false
"""vLLM's LoRA resolver on top of `AdapterSource`. Imported by `register_lora` only: it needs vLLM."""

from __future__ import annotations

import asyncio
import weakref
from functools import cached_property
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

if TYPE_CHECKING:
    from cached_client.integrations.vllm.adapters import Adapter, AdapterSource

_log = init_logger("vllm.cached")


class _HeldRequest(LoRARequest, weakref=True):  # type: ignore[call-arg, misc]
    """A request that can be watched: vLLM keeps it until the adapter is unloaded, and the adapter is held so long."""


class CachedLoRAResolver(LoRAResolver):  # type: ignore[misc]
    """Answers requests for adapters that vLLM does not have with those that the host's cache has."""

    def __init__(self) -> None:
        self._held: dict[int, Adapter] = {}

    @cached_property
    def _source(self) -> AdapterSource:
        """Made when vLLM asks for the first time: each of its processes has a resolver, and one of them uses it."""
        from cached_client.integrations.vllm.adapters import AdapterSource

        return AdapterSource()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter as vLLM wants it, its files in memory; None if the cache has none of that name for this base.

        Raises CacheError if the daemon does not answer, or cannot load it.
        """
        adapter = await asyncio.to_thread(self._source.find, lora_name, base_model_name)
        if adapter is None:
            return None
        # vLLM puts a number of its own in place of this one.
        request = _HeldRequest(lora_name=lora_name, lora_int_id=1, lora_path=str(adapter.directory))
        self._held[id(adapter)] = adapter
        weakref.finalize(request, self._held.pop, id(adapter), None)
        _log.info("cached: LoRA adapter %s is %s, at %s", lora_name, adapter.ref, adapter.directory)
        return request
