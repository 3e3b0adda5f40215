"""cached simulate: what a host of other sizes, or another policy, would have cost over a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cached.cli.output import output_option, print_json, print_table, say
from cached.errors import InvalidRequestError
from cached.policy import Hop
from cached.simulate.outcome import Outcome
from cached.simulate.run import POLICIES, simulate
from cached.simulate.setup import Setup
from cached.simulate.sweep import Curve, draw, sweep
from cached.simulate.tiers import read_tiers
from cached.simulate.trace import read_trace
from cached.units import format_duration, parse_duration, parse_size

_PNG = Path("sweep.png")
_COLUMNS = (
    "POLICY",
    "MEAN",
    "P90",
    "P99",
    "COLD STARTS",
    "SHARE",
    "L1 HITS",
    "L2 HITS",
    "FROM L2",
    "FROM L3",
    "EVICTED",
)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Bandwidth(click.ParamType[int]):
    name = "size/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            rate = parse_size(str(value).removesuffix("/s"))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if rate <= 0:
            self.fail(f"{value!r} would never end; write a bandwidth such as '6GB/s'", param, ctx)
        return rate


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Policies(click.ParamType[tuple[str, ...]]):
    name = "name,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",") if name.strip()))
        unknown = [name for name in names if name not in POLICIES]
        if unknown or not names:
            self.fail(f"{', '.join(unknown) or 'nothing'} is not among {', '.join(POLICIES)}", param, ctx)
        return names


class _Sizes(click.ParamType[tuple[int, ...]]):
    name = "size,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(parse_size(part) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command("simulate", short_help="What other sizes or policies would have cost here.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--l1", type=_Size(), default="500GB", show_default=True, help="L1's capacity.")
@click.option("--l2", type=_Size(), default="2TB", show_default=True, help="L2's capacity.")
@click.option("--l2-latency", type=_Duration(), default="1s", show_default=True, help="Of a load from L2.")
@click.option("--l2-bandwidth", type=_Bandwidth(), default="6GB/s", show_default=True, help="Of a load from L2.")
@click.option("--l3-latency", type=_Duration(), default="3s", show_default=True, help="Of a load from the origin.")
@click.option(
    "--l3-bandwidth", type=_Bandwidth(), default="1.5GB/s", show_default=True, help="Of a load from the origin."
)
@click.option(
    "--policy",
    "policies",
    type=_Policies(),
    default=",".join(POLICIES),
    show_default=True,
    help="Which to compare: `default` is the daemon's own, `bound` what none can do better than.",
)
@click.option(
    "--tiers", type=click.Path(path_type=Path), help="A catalog, or JSON of names and tiers; only `default` heeds it."
)
@click.option(
    "--l2-preloaded",
    type=click.FloatRange(0, 1),
    metavar="FRACTION",
    help="Simulate L1 only: this share of the models is in L2 for good, chosen by the CRC-32 of their names.",
)
@click.option("--sweep-l1", type=_Sizes(), help="Simulate these capacities of L1 in turn, and draw the curve.")
@click.option("--png", type=click.Path(path_type=Path), help="Where the curve is drawn; sweep.png if nothing is said.")
@output_option
def simulate_command(
    trace: Path,
    policies: tuple[str, ...],
    sweep_l1: tuple[int, ...] | None,
    png: Path | None,
    tiers: Path | None,
    output: str,
    **host: Any,
) -> None:
    """Show what a host would have waited for models, by policy, over the attaches of a trace.

    TRACE is CSV with the columns time_s, model, size_bytes and, where known, lease_s. The daemon's own policy code runs
    against it with a simulated clock; no daemon is needed.

    Example: cached simulate trace.csv --l1 500GB --l2 2TB
    """
    setup = Setup(
        l1_bytes=host["l1"],
        l2_bytes=host["l2"],
        from_l2=Hop(host["l2_latency"], host["l2_bandwidth"]),
        from_l3=Hop(host["l3_latency"], host["l3_bandwidth"]),
        preloaded=host["l2_preloaded"],
    )
    if tiers is not None:
        setup = replace(setup, standings=read_tiers(tiers))
    rows = read_trace(trace)
    if sweep_l1 is not None:
        _sweep(sweep(setup, rows, policies, sweep_l1), png, output)
        return
    outcomes = {policy: simulate(setup, rows, policy) for policy in policies}
    if output == "json":
        print_json({"policies": {policy: outcome.to_data() for policy, outcome in outcomes.items()}})
    else:
        _print_outcomes(outcomes)


def _print_outcomes(outcomes: Mapping[str, Outcome]) -> None:
    print_table(_COLUMNS, [(policy, *_cells(outcome)) for policy, outcome in outcomes.items()], right=_COLUMNS[1:])


def _cells(outcome: Outcome) -> tuple[str, ...]:
    return (
        f"{outcome.mean_s:.2f} s",
        _seconds(outcome.p90_s),
        _seconds(outcome.p99_s),
        format_duration(outcome.cold_start_s),
        f"{outcome.cold_start_share:.1%}",
        _count(outcome.l1_hits),
        _count(outcome.l2_hits),
        _bytes(outcome.l2_bytes),
        _bytes(outcome.l3_bytes),
        _count(outcome.evictions),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    """Decimal, as the capacities of a simulation usually are."""
    return "-" if value is None else f"{value / 1e9:,.0f} GB"


def _sweep(curve: Curve, png: Path | None, output: str) -> None:
    """Prints the curve whatever comes of the drawing, which needs a library that not everybody installs."""
    _print_curve(curve, output)
    try:
        draw(curve, png or _PNG)
    except InvalidRequestError as error:
        if png is not None:
            raise
        say(f"not drawn: {error.message}; {error.hint}")
    else:
        say(f"drawn to {png or _PNG}")


def _print_curve(curve: Curve, output: str) -> None:
    if output == "json":
        points = [
            {"l1_bytes": l1_bytes, "policies": {name: outcome.to_data() for name, outcome in outcomes.items()}}
            for l1_bytes, outcomes in curve.items()
        ]
        print_json({"sweep": points})
        return
    policies = list(next(iter(curve.values())))
    columns = ("L1", *(f"{policy.upper()} MEAN" for policy in policies))
    rows = [
        (_bytes(l1_bytes), *(f"{outcomes[policy].mean_s:.2f} s" for policy in policies))
        for l1_bytes, outcomes in curve.items()
    ]
    print_table(columns, rows, right=columns)
