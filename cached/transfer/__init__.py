"""Bounded, verified, resumable movement of bytes: the planner runs in the loop, movers are processes."""
