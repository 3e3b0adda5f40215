"""Model weights from the host's cache: attached in shared memory, verified, without a copy.

::

    import cached_client

    with cached_client.connect() as cache:
        with cache.attach("all-minilm-l6-v2") as model:
            for name, tensor in model.stream(device="cuda:0"):
                ...

The daemon (``cached serve``) downloads, verifies and keeps the models; this package is what a worker needs to use them.
Importing it is cheap: grpc is loaded with the first use of `connect`, torch and numpy with the first tensor or array.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from cached_client._version import __version__
from cached_client.errors import (
    ArtifactError,
    CacheError,
    ChangedError,
    DaemonUnavailableError,
    DeviceError,
    EndpointError,
    FormatError,
    IntegrityError,
    InUseError,
    InvalidRequestError,
    LeaseLostError,
    LimitExceededError,
    NoRoomError,
    NoSourceError,
    NotFoundError,
    NotReadyError,
    OriginDeniedError,
    OriginError,
    OriginUnavailableError,
    PermissionDeniedError,
    QuarantinedError,
    SuspendedError,
    TimeoutExpiredError,
    UnsupportedDtypeError,
    WarmUpError,
)

if TYPE_CHECKING:
    from cached_client._process import load, resume, suspend, unload
    from cached_client.attach import Model
    from cached_client.cache import Cache, connect
    from cached_client.gpu.options import DeviceReport, GpuOptions
    from cached_client.sharding import shard
    from cached_client.types import DamagedRange, FileInfo, LoadReport, ModelSummary, PullProgress

__all__ = [
    "ArtifactError",
    "Cache",
    "CacheError",
    "ChangedError",
    "DaemonUnavailableError",
    "DamagedRange",
    "DeviceError",
    "DeviceReport",
    "EndpointError",
    "FileInfo",
    "FormatError",
    "GpuOptions",
    "InUseError",
    "IntegrityError",
    "InvalidRequestError",
    "LeaseLostError",
    "LimitExceededError",
    "LoadReport",
    "Model",
    "ModelSummary",
    "NoRoomError",
    "NoSourceError",
    "NotFoundError",
    "NotReadyError",
    "OriginDeniedError",
    "OriginError",
    "OriginUnavailableError",
    "PermissionDeniedError",
    "PullProgress",
    "QuarantinedError",
    "SuspendedError",
    "TimeoutExpiredError",
    "UnsupportedDtypeError",
    "WarmUpError",
    "__version__",
    "connect",
    "load",
    "resume",
    "shard",
    "suspend",
    "unload",
]

_LAZY = {
    "Cache": "cache",
    "connect": "cache",
    "load": "_process",
    "resume": "_process",
    "shard": "sharding",
    "suspend": "_process",
    "unload": "_process",
    "Model": "attach",
    "DamagedRange": "types",
    "DeviceReport": "gpu.options",
    "FileInfo": "types",
    "GpuOptions": "gpu.options",
    "LoadReport": "types",
    "ModelSummary": "types",
    "PullProgress": "types",
}


def __getattr__(name: str) -> object:
    """Loads what needs grpc when it is first used."""
    if name not in _LAZY:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value: object = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
