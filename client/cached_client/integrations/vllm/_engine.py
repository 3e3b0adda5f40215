# pyright: reportMissingImports=false
"""What vLLM tells of its configuration and of this rank. Imported by `_loader` only: it needs vLLM."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm import envs
from vllm.config import CompilationMode
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from cached_client.artifacts import environment_key
from cached_client.integrations.vllm.compile_cache import CompileCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

COMPILE_FOLDER = "torch_compile_cache"


def rank() -> str:
    """``RANK/RANKS`` of this process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return "0/1"
    return f"{distributed.get_rank()}/{distributed.get_world_size()}"


def is_first_rank() -> bool:
    """Whether it is this rank that speaks for all."""
    return rank().partition("/")[0] == "0"


def is_first_rank_of_host() -> bool:
    """Whether it is this rank that restores for those of its host."""
    return is_first_rank() or int(get_world_group().local_rank) == 0


def start_labels(config: VllmConfig) -> dict[str, str]:
    """Labels of a start."""
    return {"engine": "vllm", "engine_version": vllm.__version__, **_sizes(config)}


def compiles(config: VllmConfig) -> str:
    """Empty if vLLM keeps what it compiles; else why it does not."""
    if config.compilation_config.mode == CompilationMode.NONE:
        return "nothing is compiled (enforce_eager, or compilation mode 0)"
    if envs.VLLM_DISABLE_COMPILE_CACHE:
        return "VLLM_DISABLE_COMPILE_CACHE is set"
    return ""


def compile_cache(config: VllmConfig, ref: str, socket: str) -> CompileCache:
    """The compile cache of vLLM for a model that was loaded as ``ref`` (``NAME@REVISION``)."""
    model, compilation = config.model_config, config.compilation_config
    name, _, revision = ref.partition("@")
    key = environment_key(
        name, "vllm", revision=revision, engine_version=vllm.__version__,
        device="auto" if current_platform.is_cuda() else "cpu", platform=str(current_platform.device_type),
        dtype=str(model.dtype).removeprefix("torch."), quantization=str(model.quantization or ""),
        max_model_len=str(model.max_model_len), config=config.compute_hash(), **_sizes(config),
    )  # fmt: skip

    def used() -> list[str]:
        # vLLM points inductor to the folder of a graph that it compiles, or loads, ahead of time.
        names = (compilation.local_cache_dir, compilation.cache_dir, os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        return [name for name in names if name]

    return CompileCache(socket, Path(envs.VLLM_CACHE_ROOT, COMPILE_FOLDER), key, used, _warm_up_of(config))


def _warm_up_of(config: VllmConfig) -> Callable[[], bool]:
    """Whether this process's worker has compiled and captured all.

    vLLM tells no plugin, so the worker's own step is watched, for this one time.
    """
    warm = threading.Event()
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    step = worker.compile_or_warm_up_model

    @functools.wraps(step)
    def watched(*args: Any, **options: Any) -> Any:
        worker.compile_or_warm_up_model = step
        result = step(*args, **options)
        warm.set()
        return result

    worker.compile_or_warm_up_model = watched
    return warm.is_set


def _sizes(config: VllmConfig) -> dict[str, str]:
    parallel = config.parallel_config
    return {"tp": str(parallel.tensor_parallel_size), "pp": str(parallel.pipeline_parallel_size)}
