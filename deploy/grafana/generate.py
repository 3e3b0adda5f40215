"""Writes cached.json, the dashboard for Grafana. Run by ``make docs``; ``--check`` fails where the file is not fresh.

A panel is a line or two here and forty in JSON. Metrics and labels are checked by tests/unit/test_monitoring.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "cached.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HOSTS = 'job=~"$job", instance=~"$instance"'
MODELS = f'{HOSTS}, model=~"$model"'
RATE = "[$__rate_interval]"
WIDTH = 24


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and what a line of its answer is called. ``exemplars``: shown as points that lead to a trace."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """``unit`` is Grafana's name of it. ``red_from``: from this value on it is bad; ``green_from``: below it is."""

    title: str
    about: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    red_from: float | None = None
    green_from: float | None = None

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana has it."""
        targets = [
            {
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "refId": chr(ord("A") + position),
                **({"exemplar": True} if query.exemplars else {}),
                **({"instant": True, "format": "table"} if self.kind == "table" else {}),
                **({"instant": True} if self.kind in {"stat", "bargauge"} else {}),
            }
            for position, query in enumerate(self.queries)
        ]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": targets,
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": self._options(),
            **({"transformations": self._transformations()} if self.kind == "table" else {}),
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "min": 0}
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if self.red_from is not None:
            steps.append({"color": "red", "value": self.red_from})
        if self.green_from is not None:
            steps = [{"color": "red", "value": None}, {"color": "green", "value": self.green_from}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if self.kind == "timeseries":
            defaults["custom"] = {
                "fillOpacity": 30 if self.stacked else 8,
                "showPoints": "never",
                "stacking": {"mode": "normal" if self.stacked else "none"},
            }
        return defaults

    def _overrides(self) -> list[dict[str, Any]]:
        """The columns of a table are called, and counted, as their queries say: ``name|unit``."""
        if self.kind != "table":
            return []
        found = []
        for position, query in enumerate(self.queries):
            name, _, unit = query.legend.partition("|")
            properties = [{"id": "displayName", "value": name}, {"id": "unit", "value": unit or "short"}]
            column = f"Value #{chr(ord('A') + position)}"
            found.append({"matcher": {"id": "byName", "options": column}, "properties": properties})
        return found

    def _options(self) -> dict[str, Any]:
        if self.kind == "stat":
            return {"colorMode": "value", "graphMode": "none", "reduceOptions": {"calcs": ["lastNotNull"]}}
        if self.kind == "bargauge":
            return {"displayMode": "basic", "orientation": "horizontal", "reduceOptions": {"calcs": ["lastNotNull"]}}
        if self.kind == "table":
            return {"showHeader": True}
        return {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }

    def _transformations(self) -> list[dict[str, Any]]:
        hidden = {"Time": True, "job": True}
        return [{"id": "merge", "options": {}}, {"id": "organize", "options": {"excludeByName": hidden}}]


def per_second(metric: str, by: str, labels: str = HOSTS) -> str:
    """The rate of a counter, over all hosts that are chosen."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}{RATE}))"


def quantiles(metric: str, by: str = "", labels: str = HOSTS) -> list[Query]:
    """Median, nine of ten, and 99 of 100 of a histogram of seconds."""
    inside = f"sum by ({by + ', ' if by else ''}le) (rate({metric}_bucket{{{labels}}}{RATE}))"
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        Query(f"histogram_quantile({share}, {inside})", f"p{share * 100:g}{legend}", exemplars=share == 0.99)
        for share in (0.5, 0.9, 0.99)
    ]


def now(metric: str, labels: str = HOSTS) -> str:
    """The sum of a gauge over all hosts that are chosen."""
    return f"sum({metric}{{{labels}}})"


def level_panel(level: str, name: str) -> Panel:
    """What a level is filled with, and how much it may hold."""
    labels = f'{HOSTS}, level="{level}"'

    def of(kind: str) -> str:
        return now(f"cached_level_{kind}_bytes", labels)

    held = f"{of('used')} - {of('pool')} - {of('withdrawn')} - {of('transient')}"
    queries = [
        Query(held, "models"),
        Query(of("transient"), "beside the budget"),
        Query(of("withdrawn"), "evicted, still mapped"),
        Query(of("pool"), "pool"),
        Query(of("reserved"), "reserved for loads"),
        Query(f"clamp_min({of('capacity')} - {of('used')} - {of('reserved')}, 0)", "free"),
    ]
    return Panel(
        f"{level.upper()}, {name}",
        f"What {level.upper()} is filled with; all together are what it may hold now.",
        "bytes", queries, width=12, stacked=True,
    )  # fmt: skip


GLANCE = [
    Panel("Hosts that serve", "Daemons that are recovered and answer.", "short", [Query(now("cached_ready"), "serve")],
          kind="stat", width=4, height=4, green_from=1),
    Panel("Hosts that do not", "Daemons that run but do not serve: they start, drain, or lack their catalog.", "short",
          [Query(f"count(cached_ready{{{HOSTS}}} == 0) or vector(0)", "do not")],
          kind="stat", width=4, height=4, red_from=1),
    Panel("Hot models in place", "Share of the hot models that are in L1, verified.", "percentunit",
          [Query(f"{now('cached_hot_models_ready')} / {now('cached_hot_models')}", "in place")],
          kind="stat", width=4, height=4, green_from=1),
    Panel("Degraded", "Things that do not work as they should, over all hosts; `cached health` says why.", "short",
          [Query(now("cached_degraded"), "degraded")], kind="stat", width=4, height=4, red_from=1),
    Panel("Leases", "Workers that hold a model now.", "short", [Query(now("cached_leases"), "leases")],
          kind="stat", width=4, height=4),
    Panel("Loads in flight", "Pulls and promotions.", "short", [Query(now("cached_active_loads"), "loads")],
          kind="stat", width=4, height=4),
    level_panel("l1", "memory"),
    level_panel("l2", "disk"),
    Panel("Hosts", "One line for each host that is chosen. Quarantined and degraded should be 0.", "short", [
        Query(f"sum by (instance) (cached_ready{{{HOSTS}}})", "serves"),
        Query(f"sum by (instance) (cached_degraded{{{HOSTS}}})", "degraded"),
        Query(f"sum by (instance) (cached_quarantined_blobs{{{HOSTS}}})", "quarantined"),
        Query(f"sum by (instance) (cached_hot_models{{{HOSTS}}}) - "
              f"sum by (instance) (cached_hot_models_ready{{{HOSTS}}})", "hot, not in L1"),
        Query(f"sum by (instance) (cached_leases{{{HOSTS}}})", "leases"),
        Query(f'sum by (instance) (cached_level_used_bytes{{{HOSTS}, level="l1"}})', "L1 used|bytes"),
        Query(f'sum by (instance) (cached_level_capacity_bytes{{{HOSTS}, level="l1"}})', "L1 capacity|bytes"),
        Query(f'sum by (instance) (cached_level_used_bytes{{{HOSTS}, level="l2"}})', "L2 used|bytes"),
        Query(f'sum by (instance) (cached_level_capacity_bytes{{{HOSTS}, level="l2"}})', "L2 capacity|bytes"),
        Query(f"time() - max by (instance) (process_start_time_seconds{{{HOSTS}}})", "up for|s"),
    ], kind="table", width=24),
    Panel("What is degraded", "By reason and host; the runbook has a line for each reason.", "short",
          [Query(f"sum by (reason, instance) (cached_degraded{{{HOSTS}}}) > 0", "{{reason}} on {{instance}}")],
          width=12),
    Panel("Versions", "Daemons of each version.", "short",
          [Query(f"count by (version) (cached_build_info{{{HOSTS}}})", "{{version}}")], width=12, stacked=True),
]  # fmt: skip

DEMAND = [
    Panel("Attaches", "By where most of their bytes came from: l1 memory, l2 disk, l3 the origin.", "reqps",
          [Query(per_second("cached_attach_seconds_count", "from_level"), "{{from_level}}")], stacked=True),
    Panel("Attaches that found everything in memory", "Of all that asked. Low for models that are used often: L1 is "
          "too small.", "percentunit",
          [Query(f'sum(rate(cached_hits_total{{{HOSTS}, level="l1"}}{RATE})) / '
                 f"sum(rate(cached_hits_total{{{HOSTS}}}{RATE}))", "in L1")]),
    Panel("Leases of models", "Of the models that are chosen.", "short",
          [Query(f"topk(10, sum by (model) (cached_model_leases{{{MODELS}}}))", "{{model}}")]),
    Panel("Time to attach", "From an attach to all of its bytes being ready.", "s",
          quantiles("cached_attach_seconds", "from_level"), width=12),
    Panel("Time to load", "From the beginning of a load until it was ready.", "s",
          quantiles("cached_load_seconds", "from_level"), width=12),
    Panel("Waiting for room", "From the beginning of a load until it had its turn and its bytes were reserved.", "s",
          quantiles("cached_load_wait_seconds")),
    Panel("Loads that ended", "ok: from an origin. Everything else is the reason of an error.", "reqps",
          [Query(per_second("cached_pulls_total", "outcome") + " > 0", "{{outcome}}")], stacked=True),
    Panel("Attaches of models", "The ten that were attached most in the time shown.", "short",
          [Query(f"topk(10, sum by (model) (increase(cached_model_attaches_total{{{MODELS}}}[$__range])))",
                 "{{model}}")], kind="bargauge"),
]  # fmt: skip

MOVEMENT = [
    Panel("Bytes moved", "Verified bytes by hop: l3_l1 is origin to memory, l1_l2 memory to disk.", "Bps",
          [Query(per_second("cached_transfer_bytes_total", "hop"), "{{hop}}")], width=12),
    Panel("Processor time of a gigabyte", "What a hop costs; rises when checksums or TLS do more, or cores are short.",
          "s", [Query(f"1e9 * {per_second('cached_transfer_cpu_seconds_total', 'hop')} / "
                      f"({per_second('cached_transfer_bytes_total', 'hop')} > 0)", "{{hop}}")], width=12),
    Panel("Bytes of origins", "By origin; of a chain each link counts for itself.", "Bps",
          [Query(per_second("cached_origin_bytes_total", "origin"), "{{origin}}")], width=12),
    Panel("Failovers", "Ranges that a link of a chain could not serve, so that the next one was asked.", "ops",
          [Query(per_second("cached_origin_failovers_total", "origin, reason"), "{{origin}}: {{reason}}")], width=12),
    Panel("Retries", "Transfers that were tried again, by the error's reason.", "ops",
          [Query(per_second("cached_retries_total", "reason") + " > 0", "{{reason}}")]),
    Panel("Hedges", "Second fetches of ranges that stalled. Many: addresses of the store or the network are bad.",
          "ops", [Query(per_second("cached_hedges_total", "outcome"), "{{outcome}}")]),
    Panel("Ranges of origins", "In flight, waiting for their turn, and in flight at most, as measured.", "short", [
        Query(f"sum by (origin) (cached_origin_ranges_in_flight{{{HOSTS}}})", "in flight, {{origin}}"),
        Query(f"sum by (origin) (cached_origin_ranges_waiting{{{HOSTS}}})", "waiting, {{origin}}"),
        Query(f"sum by (origin) (cached_origin_ranges_limit{{{HOSTS}}})", "at most, {{origin}}"),
    ]),
]  # fmt: skip

FLEET = [
    Panel("Put off", "How long pulls that nobody waits for were put off in a second, over all hosts: by chance, or for "
          "a slot of the fleet.", "s", [Query(per_second("cached_stagger_seconds_total", "kind"), "{{kind}}")]),
    Panel("Slots", "taken_over: the holder was gone; skipped: the Kubernetes API was away.", "ops",
          [Query(per_second("cached_fleet_slots_total", "outcome"), "{{outcome}}")]),
    Panel("Labels of nodes", "Changes that were made, or failed.", "ops",
          [Query(per_second("cached_node_label_patches_total", "outcome"), "{{outcome}}")]),
]  # fmt: skip

POLICY = [
    Panel("Evictions", "By level and reason; docs/policy.md explains the reasons.", "ops",
          [Query(per_second("cached_evictions_total", "level, reason"), "{{level}}: {{reason}}")]),
    Panel("Admissions", "What became of models that wanted a place. Many transient: L1 is too small for what is used.",
          "ops", [Query(per_second("cached_admissions_total", "level, verdict"), "{{level}}: {{verdict}}")]),
    Panel("Bytes evicted", "Out of each level.", "Bps",
          [Query(per_second("cached_evicted_bytes_total", "level"), "{{level}}")]),
    Panel("Hot models", "What they take once all of them are there, and what they may.", "bytes", [
        Query(now("cached_level_hot_bytes", f'{HOSTS}, level="l1"'), "take"),
        Query(now("cached_level_hot_capacity_bytes", f'{HOSTS}, level="l1"'), "may take"),
    ]),
    Panel("Predictions from habit", "Right or wrong once their time is over; acted: a model was brought.", "ops",
          [Query(per_second("cached_predictions_total", "outcome"), "{{outcome}}")]),
    Panel("Precision of predictions", "Share that came true, recent ones counting more.", "percentunit",
          [Query(f"avg(cached_prediction_precision_ratio{{{HOSTS}}})", "came true")]),
]  # fmt: skip

COLDSTARTS = [
    Panel("Whole starts", "Of workers with the models that are chosen, as they told.", "s",
          quantiles("cached_coldstart_seconds", "model", MODELS), width=12),
    Panel("Phases of starts", "Median of each phase over the time shown. docs/coldstart.md says what they are.", "s",
          [Query(f"histogram_quantile(0.5, sum by (phase, le) "
                 f"(increase(cached_coldstart_phase_seconds_bucket{{{MODELS}}}[$__range])))", "{{phase}}")],
          kind="bargauge", width=12),
    Panel("Phases over time", "Median of each phase.", "s",
          [Query(f"histogram_quantile(0.5, sum by (phase, le) "
                 f"(rate(cached_coldstart_phase_seconds_bucket{{{MODELS}}}{RATE})))", "{{phase}}")], width=12),
    Panel("Starts", "Of workers, by model.", "short",
          [Query(f"sum by (model) (increase(cached_coldstart_seconds_count{{{MODELS}}}{RATE}))", "{{model}}")],
          width=12, stacked=True),
]  # fmt: skip

INTEGRITY = [
    Panel("Checksum failures", "Chunks. Any at l1 or l2: memory or a disk is failing. At l3: the origin's content.",
          "short", [Query(f"sum by (level, instance) (increase(cached_checksum_failures_total{{{HOSTS}}}{RATE}))",
                          "{{level}} on {{instance}}")]),
    Panel("Repairs", "Damaged chunks that were mended.", "short",
          [Query(f"sum by (level) (increase(cached_repaired_chunks_total{{{HOSTS}}}{RATE}))", "{{level}}")]),
    Panel("Quarantined", "Blobs that are damaged and could not be mended.", "short",
          [Query(f"sum by (instance) (cached_quarantined_blobs{{{HOSTS}}})", "{{instance}}")], red_from=1),
    Panel("Not verified for", "Since the blob that waits longest for the scrubber was last found right.", "s",
          [Query(f"max by (level, instance) (cached_level_unverified_seconds{{{HOSTS}}})",
                 "{{level}} on {{instance}}")]),
    Panel("Scrubbed", "Bytes that were read again in a second.", "Bps",
          [Query(f"sum by (level) (rate(cached_scrubbed_bytes_total{{{HOSTS}}}{RATE}))", "{{level}}")]),
]  # fmt: skip

DAEMON = [
    Panel("Failures", "By reason, of loads, calls and work in the background; docs/operations.md has what to do.",
          "ops", [Query(per_second("cached_failures_total", "reason") + " > 0", "{{reason}}")], width=12, stacked=True),
    Panel("Memory", "Of the daemons and of their movers; weights are not in it.", "bytes", [
        Query(f"max by (instance) (process_resident_memory_bytes{{{HOSTS}}})", "daemon, {{instance}}"),
        Query(f"max by (instance) (cached_mover_resident_memory_bytes{{{HOSTS}}})", "movers, {{instance}}"),
    ]),
    Panel("Processors", "Cores that the daemons and their movers use.", "short", [
        Query(f"sum by (instance) (rate(process_cpu_seconds_total{{{HOSTS}}}{RATE}))", "daemon, {{instance}}"),
        Query(f"sum by (instance) (rate(cached_mover_cpu_seconds_total{{{HOSTS}}}{RATE}))", "movers, {{instance}}"),
    ]),
    Panel("Lag of the event loop", "How late timers run: everything that a daemon answers waits for so long.", "s",
          quantiles("cached_event_loop_lag_seconds")),
    Panel("Time to answer", "99 of 100 calls of each method; streams are not counted.", "s",
          [Query(f"histogram_quantile(0.99, sum by (method, le) (rate(cached_rpc_seconds_bucket{{{HOSTS}}}{RATE})))",
                 "{{method}}", exemplars=True)]),
    Panel("Calls that failed", "By method and gRPC status. CANCELLED is how leases end.", "reqps",
          [Query(per_second("cached_rpc_total", "method, code", f'{HOSTS}, code!~"OK|CANCELLED"'),
                 "{{method}}: {{code}}")]),
    Panel("Descriptors", "Open ones, of the daemons and of their movers.", "short", [
        Query(f"max by (instance) (process_open_fds{{{HOSTS}}})", "daemon, {{instance}}"),
        Query(f"max by (instance) (cached_mover_open_fds{{{HOSTS}}})", "movers, {{instance}}"),
    ]),
    Panel("Movers", "Processes that move bytes, and those that died.", "short", [
        Query(now("cached_movers"), "alive"),
        Query(f"sum(increase(cached_mover_restarts_total{{{HOSTS}}}{RATE}))", "died"),
    ]),
    Panel("Memory pressure", "Share of the time in which all tasks of a host waited for memory. From 5 % L1 shrinks.",
          "percentunit", [Query(f"max by (instance) (cached_memory_stall_ratio{{{HOSTS}}})", "{{instance}}")],
          red_from=0.05),
    Panel("Since it last worked", "A pull, and the reading of the catalog.", "s", [
        Query(f"time() - max(cached_last_pull_success_timestamp_seconds{{{HOSTS}}})", "a pull, anywhere"),
        Query(f"time() - min(cached_catalog_last_reload_success_timestamp_seconds{{{HOSTS}}})", "the oldest catalog"),
    ]),
]  # fmt: skip

ROWS = {
    "At a glance": GLANCE,
    "Demand": DEMAND,
    "Movement": MOVEMENT,
    "Fleet": FLEET,
    "Policy": POLICY,
    "Starts of workers": COLDSTARTS,
    "Integrity": INTEGRITY,
    "The daemon": DAEMON,
}


def variables() -> list[dict[str, Any]]:
    """Data source, job, hosts, models: each offers what those before leave."""
    chosen = (
        ("job", "Job", "label_values(cached_build_info, job)"),
        ("instance", "Host", 'label_values(cached_build_info{job=~"$job"}, instance)'),
        ("model", "Model", f"label_values(cached_model_bytes{{{HOSTS}}}, model)"),
    )
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for name, label, query in chosen:
        found.append(
            {
                "name": name,
                "label": label,
                "type": "query",
                "datasource": DATASOURCE,
                "query": {"query": query, "refId": name},
                "definition": query,
                "includeAll": True,
                "multi": True,
                "allValue": ".*",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
                "refresh": 2,
                "sort": 1,
            }
        )
    return found


def panels() -> list[dict[str, Any]]:
    """Every row with its panels, from left to right and from top to bottom."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place,
                      "panels": []})  # fmt: skip
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            found.append(panel.json(len(found) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return found


def dashboard() -> dict[str, Any]:
    """All of it."""
    return {
        "uid": "cached",
        "title": "cached: model weights on GPU hosts",
        "description": "One host, or all of them: choose with Host. What to do about alerts: docs/observability.md.",
        "tags": ["cached", "models", "gpu"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": panels(),
    }


def main() -> int:
    """Writes, or with ``--check`` compares; the exit code."""
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if FILE.read_text(encoding="utf-8") != text:
            print(f"{FILE.name} is not what this writes; run: make docs", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
