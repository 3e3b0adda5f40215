"""The same trace under several sizes of L1, and the curve that this draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cached.errors import InvalidRequestError
from cached.simulate.outcome import Outcome
from cached.simulate.run import simulate
from cached.simulate.setup import Setup
from cached.simulate.trace import Row

Curve = Mapping[int, Mapping[str, Outcome]]
"""Bytes of L1 → policy → outcome."""

_INSTALL = "install it beside cached: pip install 'cached[draw]'"


def sweep(setup: Setup, rows: Sequence[Row], policies: Sequence[str], l1_sizes: Sequence[int]) -> Curve:
    """Simulates every policy with every size of L1, the smallest first. Raises as ``simulate``."""
    return {
        l1_bytes: {policy: simulate(replace(setup, l1_bytes=l1_bytes), rows, policy) for policy in policies}
        for l1_bytes in sorted(set(l1_sizes))
    }


def draw(curve: Curve, path: Path) -> None:
    """Writes the mean cold start over the size of L1 as a PNG. Raises InvalidRequestError when that cannot be done."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequestError("matplotlib, which draws the curve, is not installed", hint=_INSTALL) from error

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = [l1_bytes / 1e9 for l1_bytes in curve]
    for policy in next(iter(curve.values()), {}):
        axes.plot(sizes, [outcomes[policy].mean_s for outcomes in curve.values()], marker="o", label=policy)
    axes.set(xlabel="L1 (GB)", ylabel="mean cold start (s)", ylim=(0, None), title="What more memory is worth")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error}", hint="give another --png") from error
