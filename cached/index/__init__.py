"""What is known across restarts: models, manifests, blobs and interrupted pulls. The only importer of diskcache."""

from cached.index.index import Index
from cached.index.records import AccessRecord, ModelRecord, PartFile, PartRecord, PendingPull, TimedPull, VerifiedRecord
from cached.index.store import Store

__all__ = [
    "AccessRecord",
    "Index",
    "ModelRecord",
    "PartFile",
    "PartRecord",
    "PendingPull",
    "Store",
    "TimedPull",
    "VerifiedRecord",
]
