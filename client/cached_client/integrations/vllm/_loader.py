# pyright: reportMissingImports=false
"""vLLM's model loader for the load format ``cached``. Imported by `register` only: it needs vLLM."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.platforms import current_platform

from cached_client.errors import CacheError, InvalidRequestError
from cached_client.integrations.vllm import _engine as engine
from cached_client.integrations.vllm.naming import choose_ref, name_of
from cached_client.integrations.vllm.options import parse_options
from cached_client.integrations.vllm.start import LoadStart
from cached_client.integrations.vllm.weights import WeightLoad, may_fall_back, pull

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

_log = init_logger("vllm.cached")


@dataclasses.dataclass(slots=True)
class _Loaded:
    """What a module was loaded from, so that a reload finds just that content again."""

    path: str
    ref: str
    held: WeightLoad | None = None


_loaded: WeakKeyDictionary[nn.Module, _Loaded] = WeakKeyDictionary()


class CachedModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads weights from the host's cache, as they arrive there.

    Of vLLM's default loader it takes what follows the reading: the check that no parameter was forgotten, and the
    choice of a rank's experts. Every rank attaches by itself; the daemon has one download and one copy.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises InvalidRequestError for options that are not known or not right."""
        self.options = parse_options(load_config.model_loader_extra_config)
        # As vLLM's own loader has it, which also is the fallback.
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))
        self._beside: str | None = None
        self._start: LoadStart | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Has the daemon bring the model into memory, and waits for that."""
        ref = choose_ref(model_config.model, self.options.model)
        _log.info("cached: %s is in memory", pull(self.options, ref))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As vLLM's, for the engine's model, or for a draft model that it has beside that one."""
        main = vllm_config.model_config
        self._beside = model_config.model if main is not None and model_config.model != main.model else None
        is_main = model_config is main
        self._start = start = self._begin_start(vllm_config) if is_main else None
        loaded: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        self._start = None
        done = _loaded.get(loaded)
        if self.options.compile_cache and is_main:
            self._keep_compiled(vllm_config, done.ref if done is not None else "", start)
        if start is not None:
            start.report(self.options.socket)
        return loaded

    def _begin_start(self, vllm_config: VllmConfig) -> LoadStart | None:
        if not (self.options.report_start and engine.is_first_rank()):
            return None
        start = LoadStart(engine.start_labels(vllm_config))
        start.step("build_model")
        return start

    def _keep_compiled(self, vllm_config: VllmConfig, ref: str, start: LoadStart | None) -> None:
        """Once all ranks have loaded, they compile: what is restored here, in time for that, is for all of a host."""
        why_not = engine.compiles(vllm_config) or ("" if ref else "the weights did not come from the cache")
        if why_not:
            _log.info("cached: no compile cache is kept: %s", why_not)
            return
        if start is not None:
            start.step("restore_compile_cache")
        try:
            if engine.is_first_rank_of_host():
                cache = engine.compile_cache(vllm_config, ref, self.options.socket)
                cache.restore()
                if engine.is_first_rank():
                    cache.watch()
        except Exception:  # noqa: BLE001 the engine starts without it
            _log.exception("cached: no compile cache is kept")

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yields ``(name, tensor)`` as they arrive; vLLM's load and its ``reload_weights`` both take them from here.

        Raises CacheError. With the option ``fallback`` an error before the first tensor has vLLM's own loader read the
        directory instead, and a warning says so.
        """
        _refuse_special(self, model)
        self.counter_before_loading_weights = time.perf_counter()  # vLLM logs how long ago that was
        path, rank, before, start = model_config.model, engine.rank(), _loaded.get(model), self._start
        ref = self._ref(path, before)
        load = WeightLoad(self.options, ref, client_name=f"vllm {name_of(ref)} rank {rank}", rank=rank, start=start)
        load.timings.device = _device_name(self)
        tensors = load.tensors(self._ring_device(), self._skip())
        if start is not None:
            start.step("load_weights")
        try:
            first = next(tensors, None)
        except CacheError as error:
            if self.options.fallback == "none" or not may_fall_back(error) or not os.path.isdir(path):
                raise
            yield from self._fall_back(error, load, model_config, model)
            return
        if first is not None:
            yield first
        yield from tensors
        if start is not None:
            start.step("process_weights")
        _loaded[model] = _Loaded(path, load.ref, load if self.options.hold else None)
        if before is not None and before.held is not None:
            before.held.close()
        _log.info("cached: loaded %s", load.timings.line())

    def _ref(self, path: str, before: _Loaded | None) -> str:
        """What to attach. A reload gets the revision that was loaded, unless it names another path."""
        if before is not None and before.path == path:
            return before.ref
        elsewhere = before is not None or self._beside is not None
        return choose_ref(path, "" if elsewhere else self.options.model)

    def _ring_device(self) -> torch.device | None:
        """The GPU that the ring copies to; None: tensors are handed over as views of shared memory."""
        name = _device_name(self)
        kind, _, number = name.partition(":")
        if not (self.options.ring and kind == "cuda" and current_platform.is_cuda()):
            return None
        return torch.device(name if number else f"cuda:{torch.cuda.current_device()}")

    def _skip(self) -> Callable[[str], bool] | None:
        """Which tensors are of other ranks' experts; None: this rank gets all."""
        local: set[int] | None = getattr(self, "local_expert_ids", None)
        if local is None:
            return None
        from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

        return lambda name: bool(should_skip_weight(name, local))

    def _fall_back(
        self, error: CacheError, load: WeightLoad, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        _log.warning(
            "cached: FALLBACK: rank %s loads %s with vLLM's own loader, because the cache did not serve it: %s: %s",
            load.timings.rank, model_config.model, error.reason, error,
        )  # fmt: skip
        yield from super().get_all_weights(model_config, model)
        _log.warning("cached: loaded model=%s rank=%s fallbacks=1 reason=%s", load.ref, load.timings.rank, error.reason)


def _device_name(loader: DefaultModelLoader) -> str:
    return str(loader.load_config.device or current_platform.device_type)


def _refuse_special(loader: DefaultModelLoader, model: nn.Module) -> None:
    """What vLLM's own loader does beside handing a checkpoint's tensors over, and this one does not."""
    special = {
        "takes weights from a second source": bool(getattr(model, "secondary_weights", ())),
        "chooses its weight files by itself": getattr(model, "allow_patterns_overrides", None) is not None,
        "is a torchao checkpoint": loader.load_config.safetensors_load_strategy == "torchao",
    }
    for what, found in special.items():
        if found:
            raise InvalidRequestError(
                f"--load-format cached does not serve this model: it {what}",
                hint="the same directory works with --load-format auto",
                value=type(model).__name__,
            )
