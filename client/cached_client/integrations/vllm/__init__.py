# pyright: reportMissingImports=false
"""vLLM: the load format ``cached``, and LoRA adapters by name.

vLLM finds `register` and `register_lora` by their entry points in the group ``vllm.general_plugins`` and calls them in
every process that it starts. With this package installed beside vLLM one option changes::

    vllm serve $(cached path llama-13b) --load-format cached

==============  ========================================================================================================
`options`       what ``--model-loader-extra-config`` may say (pure)
`naming`        from a model's directory to its name in the cache (pure)
`weights`       one rank's load: attach, tensors as they arrive, what it took
`start`         the timeline of one rank's start, for the daemon
`compile_cache` vLLM's compile cache: restored, watched, saved
`staging`       a folder with the small files, where the directory view is not to be seen
`adapters`      LoRA adapters: from a name to a directory that stays for as long as it is used
`_loader`       vLLM's model loader
`_engine`       what vLLM tells of its configuration and of this rank
`_lora`         vLLM's LoRA resolver
==============  ========================================================================================================

Importing this imports neither vLLM nor torch, and works where there is no vLLM.
"""

from __future__ import annotations

LOAD_FORMAT = "cached"
LORA_RESOLVER = "cached"

_registered: set[str] = set()


def register() -> None:
    """Makes the load format ``cached`` known to vLLM in this process. Idempotent. ImportError without vLLM."""
    if "loader" in _registered:
        return
    from vllm.model_executor.model_loader import register_model_loader

    from cached_client.integrations.vllm._loader import CachedModelLoader

    register_model_loader(LOAD_FORMAT)(CachedModelLoader)
    _registered.add("loader")


def register_lora() -> None:
    """Lets vLLM ask the cache for LoRA adapters that it does not know. Idempotent. ImportError without vLLM.

    vLLM asks only where ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` is set and LoRA is on.
    """
    if "lora" in _registered:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from cached_client.integrations.vllm._lora import CachedLoRAResolver

    LoRAResolverRegistry.register_resolver(LORA_RESOLVER, CachedLoRAResolver())
    _registered.add("lora")
