"""What vLLM's own entry makes of the plugin, without an engine. Run by the Python that has vLLM.

``python loader_checks.py refuse '{"modle": "x"}'`` ends with the loader's error; ``python loader_checks.py all NAME``
prints what it checked, and fails with a traceback.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.load import LoadConfig
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.model_executor.model_loader import get_model_loader
from vllm.plugins import load_general_plugins

import cached_client
from cached_client.integrations import vllm as plugin


def loader(**extra: Any) -> Any:
    return get_model_loader(LoadConfig(load_format="cached", model_loader_extra_config=extra))


def refused(ours: Any, path: str, module: torch.nn.Module) -> str:
    """What is said when this is loaded."""
    try:
        next(ours.get_all_weights(SimpleNamespace(model=path), module))
    except cached_client.InvalidRequestError as error:
        return str(error)
    raise AssertionError(f"{path} was loaded")


def check_registration() -> None:
    before = type(loader()), LoRAResolverRegistry.get_resolver("cached")
    plugin.register()
    plugin.register_lora()
    assert before == (type(loader()), LoRAResolverRegistry.get_resolver("cached"))


def check_download(name: str) -> None:
    loader(model=name).download_model(SimpleNamespace(model="/anywhere"))
    with cached_client.connect() as cache:
        [summary] = [item for item in cache.list() if item.name == name]
        assert summary.l1_bytes == summary.size_bytes > 0


def check_special_models(name: str) -> None:
    for attribute, value in (("secondary_weights", ["x"]), ("allow_patterns_overrides", ["*.safetensors"])):
        module = torch.nn.Module()
        setattr(module, attribute, value)
        assert "--load-format auto" in refused(loader(model=name), "/anywhere", module)


def check_reload_elsewhere(name: str) -> None:
    """A path that is not of the cache never gets what was loaded before under another path."""
    module, ours = torch.nn.Module(), loader(model=name)
    assert len(dict(ours.get_all_weights(SimpleNamespace(model="/anywhere"), module))) > 0
    assert len(dict(ours.get_all_weights(SimpleNamespace(model="/anywhere"), module))) > 0
    assert "'/elsewhere'" in refused(ours, "/elsewhere", module)


def main() -> None:
    load_general_plugins()
    if sys.argv[1] == "refuse":
        loader(**json.loads(sys.argv[2]))
        return
    check_registration()
    for check in (check_download, check_special_models, check_reload_elsewhere):
        check(sys.argv[2])
        sys.stdout.write(f"{check.__name__}\n")


if __name__ == "__main__":
    main()
