"""The engine that joins index, ledger, leases, policy, levels and transfer. Knows no concrete origin, gRPC or HTTP."""

from cached.cache.attachment import Attachment
from cached.cache.model_cache import ModelCache

__all__ = ["Attachment", "ModelCache"]
