"""What a host would have cost under a policy: the daemon's own policy code against a trace, with a simulated clock."""

from cached.simulate.outcome import Outcome
from cached.simulate.run import POLICIES, simulate
from cached.simulate.setup import Setup
from cached.simulate.trace import Row, read_trace

__all__ = ["POLICIES", "Outcome", "Row", "Setup", "read_trace", "simulate"]
