"""A model in an ordinary folder, brought there without a daemon: the seeds of a cluster, before the cache is there."""

from cached.standalone.engine import MIN_MEMORY_BYTES, open_tools
from cached.standalone.folder import SeedFolder
from cached.standalone.pull import SeedPull
from cached.standalone.values import Pulled, Wanted

__all__ = ["MIN_MEMORY_BYTES", "Pulled", "SeedFolder", "SeedPull", "Wanted", "open_tools"]
