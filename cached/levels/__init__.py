"""The local levels: L1 (shared memory) and L2 (disk)."""
