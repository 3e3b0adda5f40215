"""How long a plan takes, and what policies cost on synthetic traces: ``python -m bench.policy``.

With ``--trace FILE`` instead: the daemon's policy and its baselines beside libcachesim's on that trace, L1 alone, with
60 % of the models in L2.

A plan is made on the daemon's loop, so it must be short: 5 ms for 1,000 models, each of four blobs of its own and one
that is shared, all of them evictable.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path

from bench import outside
from cached.level import Level
from cached.policy import Demand, Hop, LevelFacts, Need, Otherwise, RevisionFacts, Snapshot, plan
from cached.simulate import POLICIES, Row, Setup, read_trace, simulate
from cached.types import Tier
from cached.units import parse_size

GB = 10**9
DAY_S = 86_400.0
SIZES_GB = (1, 2, 7, 14.5, 16, 29.5, 65, 93, 141, 281)
NOW_S = 1e6


def crowded(models: int, seed: int = 1) -> Snapshot:
    """An L1 full of models, and one more that wants in."""
    rng = random.Random(seed)
    revisions = []
    for number in range(models):
        own = {f"{number}-{blob}": rng.randrange(1, 5 * GB) for blob in range(4)} | {f"base-{number // 10}": GB}
        demand = Demand(NOW_S - rng.uniform(0, DAY_S), (rng.random(), rng.uniform(0, 9), rng.uniform(0, 99)))
        revisions.append(
            RevisionFacts(
                f"m{number}", "1", rng.choice([Tier.AUTO, Tier.WARM, Tier.COLD]), last_used_s=demand.time_s,
                l1_blobs=own, l2_blobs=own if rng.random() < 0.6 else {}, requests=demand, misses=demand,
            )
        )  # fmt: skip
    used = sum({digest: size for facts in revisions for digest, size in facts.l1_blobs.items()}.values())
    newcomer = RevisionFacts("new", "1", Tier.AUTO, requests=Demand(NOW_S, (50.0, 50.0, 50.0)))
    need = Need(Level.L1, 100 * GB, "new", newcomer, Otherwise.TRANSIENT)
    return Snapshot(tuple(revisions), {Level.L1: LevelFacts(Level.L1, used, used)}, (need,))


def plan_ms(models: int, rounds: int = 20) -> float:
    """Median milliseconds of a plan that evicts."""
    snapshot, taken = crowded(models), []
    for _ in range(rounds):
        begin = time.perf_counter()
        plan(snapshot, NOW_S)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3


class Synthetic:
    """Traces of several shapes, the same ones for the same seed: 120 models of 1 to 281 GB, two weeks."""

    def __init__(self, seed: int, models: int = 120, rows: int = 3000, days: float = 14.0) -> None:
        self.rng = random.Random(seed)
        self.sizes = [int(self.rng.choice(SIZES_GB) * GB * self.rng.uniform(0.8, 1.2)) for _ in range(models)]
        self.rows, self.span_s = rows, days * DAY_S

    def row(self, time_s: float, model: int) -> Row:
        return Row(time_s, f"m{model}", self.sizes[model])

    def weights(self, skew: float) -> list[float]:
        weights = [1 / (rank + 1) ** skew for rank in range(len(self.sizes))]
        self.rng.shuffle(weights)
        return weights

    def choose(self, weights: Sequence[float]) -> int:
        return self.rng.choices(range(len(self.sizes)), weights)[0]

    def when(self) -> float:
        return self.rng.uniform(0, self.span_s)

    def zipf(self) -> list[Row]:
        """Popularity by rank, at any time."""
        weights = self.weights(0.9)
        return [self.row(self.when(), self.choose(weights)) for _ in range(self.rows)]

    def diurnal(self) -> list[Row]:
        """Each model has its eight hours of the day."""
        weights = self.weights(0.7)
        rows: list[Row] = []
        begins = [self.rng.choice([2, 9, 9, 10, 13, 20]) / 24 for _ in self.sizes]
        while len(rows) < self.rows:
            time_s, model = self.when(), self.choose(weights)
            if (time_s / DAY_S - begins[model]) % 1 < 1 / 3 or self.rng.random() < 0.05:
                rows.append(self.row(time_s, model))
        return rows

    def churn(self) -> list[Row]:
        """New models come all the time, and are forgotten within days."""
        births = [self.rng.uniform(-5 * DAY_S, self.span_s) for _ in self.sizes]
        fame = [self.rng.paretovariate(1.1) for _ in self.sizes]
        rows = []
        for _ in range(self.rows):
            now = self.when()
            weights = [f * exp((b - now) / (3 * DAY_S)) if now > b else 0 for f, b in zip(fame, births, strict=True)]
            if any(weights):
                rows.append(self.row(now, self.choose(weights)))
        return rows

    def scan(self) -> list[Row]:
        """As zipf, and ten times somebody goes through all models."""
        rows = self.zipf()
        for _ in range(10):
            begin_s = self.when()
            rows += [self.row(begin_s + 60.0 * model, model) for model in range(len(self.sizes))]
        return rows

    def rising(self) -> list[Row]:
        """As zipf, and some large models are used a lot for some days."""
        rows = self.zipf()
        for _ in range(4):
            model, begin_s = self.sizes.index(self.rng.choice(sorted(self.sizes)[-40:])), self.when()
            rows += [self.row(begin_s + self.rng.uniform(0, 3 * DAY_S), model) for _ in range(150)]
        return rows

    def bursts(self) -> list[Row]:
        """A model that is used is used again within minutes, some times; then not for long."""
        weights = self.weights(0.8)
        rows: list[Row] = []
        while len(rows) < self.rows:
            time_s, model = self.when(), self.choose(weights)
            for _ in range(1 + int(self.rng.expovariate(0.2))):
                rows.append(self.row(time_s, model))
                time_s += self.rng.expovariate(1 / 600)
        return rows


SHAPES: dict[str, Callable[[Synthetic], list[Row]]] = {
    "zipf": Synthetic.zipf,
    "diurnal": Synthetic.diurnal,
    "churn": Synthetic.churn,
    "scan": Synthetic.scan,
    "rising": Synthetic.rising,
    "bursts": Synthetic.bursts,
}


def synthetic(shape: str, seed: int) -> list[Row]:
    """A trace of one of SHAPES, in order of time."""
    return sorted(SHAPES[shape](Synthetic(seed)), key=lambda row: row.time_s)


def compare(trace: Path, l1_bytes: int, python: Path) -> None:
    """Prints the share of cold-start seconds that each policy leaves, the least first."""
    rows = read_trace(trace)
    setup = Setup(l1_bytes, 0, Hop(1.0, 6e9), Hop(3.0, 1.5e9), preloaded=0.6)
    shares: dict[str, float | str] = {
        f"cached: {policy}": simulate(setup, rows, policy).cold_start_share for policy in POLICIES
    }
    shares |= {
        f"libcachesim: {policy}": outside.cold_start_share(setup, rows, policy, python) for policy in outside.POLICIES
    }
    for name, share in sorted(shares.items(), key=lambda item: (isinstance(item[1], str), item[1])):
        print(f"{name:>24}  {share if isinstance(share, str) else f'{share:.3f}'}")


def main() -> None:
    """Prints both tables, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trace", type=Path, help="a trace of attaches, as `cached stats --trace` writes them")
    parser.add_argument("--l1", default="500GB", help="L1's capacity for --trace (default: 500GB)")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter with the peers")
    options = parser.parse_args()
    if options.trace:
        compare(options.trace, parse_size(options.l1), options.peers)
        return
    for models in (100, 1000):
        print(f"plan of {models} models: {plan_ms(models):.2f} ms")
    setup = Setup(500 * GB, 1000 * GB, Hop(1.0, 6e9), Hop(3.0, 1.5e9))
    print("mean cold start in seconds:   default     lru    gdsf   bound")
    for shape in SHAPES:
        for seed in range(options.seeds):
            rows = synthetic(shape, seed)
            means = [simulate(setup, rows, policy).mean_s for policy in ("default", "lru", "gdsf", "bound")]
            print(f"{shape:>24} {seed:>2}", " ".join(f"{mean:7.2f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
