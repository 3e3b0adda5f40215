"""Compile artifacts: caches of torch.compile, Triton, vLLM and TensorRT, saved once and restored at every later start.

::

    from cached_client import artifacts

    with artifacts.compile_cache(cache, model="llama-13b", engine="torch", set_environment=True):
        model = torch.compile(module)
        model(example)              # compiles at the first start ever, and loads what was compiled at every other

An artifact is found by its exact key (`environment_key`): what differs is a miss, and it is said what differs. What is
restored is code that this process is going to run: restore only from a daemon whose users you trust with that.
Importing this loads neither grpc nor torch.
"""

from __future__ import annotations

from cached_client.artifacts.archive import Archive, scan
from cached_client.artifacts.environment import environment_key
from cached_client.artifacts.session import CompileCache, compile_cache
from cached_client.artifacts.store import Difference, Missed, Restored, Saved, differences, restore, save
from cached_client.artifacts.unpack import unpack

__all__ = [
    "Archive",
    "CompileCache",
    "Difference",
    "Missed",
    "Restored",
    "Saved",
    "compile_cache",
    "differences",
    "environment_key",
    "restore",
    "save",
    "scan",
    "unpack",
]
