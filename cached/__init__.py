"""The daemon of the weight cache: fetches a model once, proves every byte, shares it with all workers of a host."""

__version__ = "0.1.0"
