"""The engine that joins index, ledger, leases, policy, levels and transfer. Knows no concrete origin, gRPC or HTTP."""
