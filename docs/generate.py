"""Writes the parts of the documents that the code knows best: between ``<!-- begin X -->`` and ``<!-- end X -->``.

Run by ``make docs``. ``--check`` writes nothing, and exits with 1 and a diff where a document is not what would be
written.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from bench.churn.report import churn_text
from bench.compile_starts import starts_text
from bench.fleet import fleet_text
from bench.headline import headline_text
from bench.scale import scale_text
from bench.tables import part_text, required_text
from cached import errors, failures, metrics, settings
from cached.cli.bench.command import HOPS as BENCH_HOPS
from cached.cli.doctor.registry import CHECKS as DOCTOR_CHECKS
from cached.cli.failures import exit_code
from cached.cli.main import cli
from cached.policy import admission, demand, worth
from cached.policy.plan import REASONS
from cached.rpc.errors import status_code
from cached.units import format_duration
from cached_client import errors as client_errors
from cached_client.coldstart import PHASES
from cached_client.integrations.vllm.options import LoaderOptions
from tests.fault.noted import RESULTS as FAULTS_NOTED
from tests.fault.noted import note as note_faults
from tests.fault.report import faults_text
from tests.simulator.report import histories_text

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
CONTRACT = ROOT / "proto" / "cached" / "v1" / "cached.proto"
PACKAGES = (ROOT / "cached", ROOT / "client" / "cached_client")
BANNER = "<!-- Written by `make docs` from the code. Do not edit down to the end mark. -->"


# The settings.


def settings_text() -> str:
    """A table for each section."""
    parts = []
    for section, kind in settings.sections().items():
        rows = [
            (f"`{item.key}`", f"`{item.variable}`", f"`{item.default}`", item.doc)
            for item in settings.describe_settings()
            if item.key.startswith(f"{section}.")
        ]
        parts.append(f"### `[{section}]`\n\n{kind.__doc__}\n\n{table(('Setting', 'Variable', 'Default', ''), rows)}")
    return "\n\n".join(parts)


# The metrics.


def metrics_text() -> str:
    """One table."""
    rows = [
        (f"`{item.name}`", item.type, ", ".join(f"`{label}`" for label in item.labels) or "none", item.help)
        for item in metrics.METRICS
    ]
    return table(("Metric", "Type", "Labels", "Meaning"), rows)


# The wire contract.


def rpc_text() -> str:
    """The methods, with what the contract says of each."""
    rows = [(f"`{name}`", kind, text) for name, kind, text in rpcs()]
    return table(("Method", "Answers", "What it does"), rows)


def rpcs() -> Iterator[tuple[str, str, str]]:
    """Name, ``one`` or ``stream``, and comment of each method of the service, from the .proto."""
    comment: list[str] = []
    before = ""
    for raw in CONTRACT.read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
        elif match := re.match(r"rpc (\w+)\((?:stream )?\w+\) returns \((stream )?\w+\);", line):
            yield match[1], "stream" if match[2] else "one", " ".join(comment) or f"See `{before}`."
            before = match[1]
            comment = []
        else:
            comment = []


# The errors.

_INTERNAL = "A fault of the daemon's own; its log has the traceback."


def errors_text() -> str:
    """Reason and meaning of each error of the daemon, and whose affair it is."""
    rows = []
    for reason, kind in errors.all_errors().items():
        again = "yes" if kind.retryable else ""
        text = _INTERNAL if kind is errors.CachedError else first_paragraph(kind.__doc__)
        rows.append((f"`{reason}`", failures.kind_of(reason).whose.value, again, text))
    return table(("Reason", "Whose", "Retry", "Meaning"), rows)


def failures_text() -> str:
    """Where each kind of failure is to be seen, and what to do about it."""
    kinds = errors.all_errors()
    rows = []
    for item in failures.KINDS:
        client = type(client_errors.error_of_reason(item.reason, "")).__name__
        told = ", ".join(f"`{event}`" for event in item.events) or "none: no daemon runs"
        alerts = ", ".join(f"[{alert}](observability.md#{alert.lower()})" for alert in item.alerts)
        rows.append(
            (
                f"[`{item.reason}`](operations.md#{item.reason.lower()})",
                f"`{status_code(kinds[item.reason]('')).name}`",
                str(exit_code(item.reason)),
                f"`{client}`",
                f'`cached_failures_total{{reason="{item.reason}"}}`',
                told,
                alerts,
            )
        )
    return table(("What to do", "gRPC status", "Exit code", "Client", "Metric", "Events", "Alerts"), rows)


def client_errors_text() -> str:
    """The kinds of CacheError that a worker meets."""
    kinds = [kind for kind in vars(client_errors).values() if isinstance(kind, type)]
    rows = [
        (f"`{kind.__name__}`", f"`{kind.kind_reason}`", first_paragraph(kind.__doc__))
        for kind in kinds
        if issubclass(kind, client_errors.CacheError)
    ]
    return table(("Class", "Reason", "Meaning"), rows)


# The vLLM plugin.


def vllm_options_text() -> str:
    """What `--model-loader-extra-config` may say."""
    defaults = LoaderOptions()
    rows = []
    for item in dataclasses.fields(LoaderOptions):
        default = getattr(defaults, item.name)
        shown = "" if default in ("", None) or item.name == "gpu" else f"`{json.dumps(default)}`"
        kind = {"str": "text", "bool": "true or false", "GpuOptions": "object"}.get(str(item.type), "seconds")
        rows.append((f"`{item.name}`", kind, shown, item.metadata["doc"]))
    return table(("Option", "Type", "Default", ""), rows)


# The phases of a start.


def phases_text() -> str:
    """The standard names."""
    return table(("Phase", "From, to"), [(f"`{name}`", text) for name, text in PHASES.items()])


# The command line.


def cli_text() -> str:
    """Every verb: its usage, its help and its options."""
    return "\n\n".join(_verb_text(name, command) for name, command in verbs())


def verbs(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its full name; groups are entered."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _verb_text(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"cached {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"### `cached {name}`", f"```\ncached {name} {usage}\n```", _help_text(command.help or "")]
    options = [item for item in command.params if isinstance(item, click.Option)]
    if options:
        parts.append("\n".join(f"- `{_option_name(item, context)}`: {_option_help(item)}" for item in options))
    return "\n\n".join(part for part in parts if part)


def _help_text(text: str) -> str:
    """Paragraphs as they are; examples as code."""
    shown = []
    for paragraph in text.split("\n\n"):
        keeps_lines = "\b" in paragraph
        lines = [line.strip() for line in paragraph.replace("\b\n", "").splitlines()]
        if re.match(r"Examples?:$", lines[0]):
            shown.append("```\n" + "\n".join(filter(None, lines[1:])) + "\n```")
        elif lines[0].startswith("Example: "):
            shown.append("```\n" + " ".join(lines).removeprefix("Example: ").strip() + "\n```")
        elif keeps_lines:
            shown.append("```\n" + "\n".join(lines) + "\n```")
        else:
            shown.append(" ".join(lines))
    return "\n\n".join(shown)


def _option_name(option: click.Option, context: click.Context) -> str:
    names = ", ".join(option.opts) + "".join(f" / {name}" for name in option.secondary_opts)
    if option.is_flag:
        return names
    return f"{names} {option.make_metavar(context)}"


def _option_help(option: click.Option) -> str:
    default = f" Default: `{option.default}`." if option.show_default and not option.is_flag else ""
    if option.secondary_opts:
        default = f" Default: `{option.opts[0] if option.default else option.secondary_opts[0]}`."
    return f"{option.help}{default}" + (" Required." if option.required else "")


# The checks of this host.


def doctor_checks_text() -> str:
    """By group, in the order in which they are made."""
    rows = [
        (item.group.value, f"`{item.name}`", item.about, item.details + (" (experiment)" if item.experiment else ""))
        for item in DOCTOR_CHECKS
    ]
    return table(("Group", "Check", "Whether", "Looks at"), rows)


def bench_hops_text() -> str:
    """In the order in which they are measured."""
    rows = [(", ".join(f"`{name}`" for name in hop.names), hop.details) for hop in BENCH_HOPS]
    return table(("Hop", "Measures"), rows)


# The house.


def house_text() -> str:
    """Every module, with the first sentence that it says of itself."""
    lines: list[str] = []
    for package in PACKAGES:
        top = f"{package.relative_to(ROOT)}/"
        lines += _folder_lines(package, top)
    return "```\n" + "\n".join(lines) + "\n```"


def _folder_lines(folder: Path, name: str, depth: int = 0) -> list[str]:
    lines = [_house_line(depth, name, _summary(folder / "__init__.py"))]
    if name.strip("/") == "_proto":
        return lines
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (path / "__init__.py").exists():
            lines += _folder_lines(path, f"{path.name}/", depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(_house_line(depth + 1, path.name, _summary(path)))
    return lines


def _house_line(depth: int, name: str, text: str) -> str:
    return f"{'  ' * depth + name:<28} {text}".rstrip()


def _summary(path: Path) -> str:
    text = first_paragraph(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    return re.split(r"\. |; ", text.replace("`", ""), maxsplit=1)[0].rstrip(".")


# The policy.


def policy_numbers_text() -> str:
    """What the policy's decisions are made with."""
    short, middle, long = (format_duration(half_life_s) for half_life_s in demand.HALF_LIVES_S)
    rows = [
        ("half-lives of requests", f"{short}, {middle}, {long}", "how fast a request is forgotten; all three are kept"),
        ("horizon", format_duration(demand.HORIZON_S), "how far ahead requests are counted"),
        ("margin", f"{admission.MARGIN:g}", "a newcomer must be worth this many times what goes for it"),
        ("patience", f"{admission.PATIENCE:g}", "so many reloads of what would go its users wait, then it is let in"),
        ("warm", f"x {worth.WARM_FACTOR:g}", "what a request for a warm model counts"),
        ("warm and unasked", f"{worth.WARM_FLOOR:.2g} requests", "expected at least of a warm model in the horizon"),
        ("priority", "x 2", "for each step"),
    ]  # fmt: skip
    return table(("", "Value", "Meaning"), rows)


def policy_reasons_text() -> str:
    """Labels of evictions."""
    return table(("Reason", "Meaning"), [(f"`{reason}`", text) for reason, text in REASONS.items()])


def policy_verdicts_text() -> str:
    """Labels of admissions."""
    return table(("Verdict", "Meaning"), [(f"`{verdict}`", text) for verdict, text in admission.VERDICTS.items()])


# What was measured.

MEASURED = ("s3", "nvme", "warm", "workers", "streaming", "control", "gpu")
"""The parts of the benchmark, each with a part of docs/performance.md of its own."""


# What they share.


def first_paragraph(text: str | None) -> str:
    """On one line, with reStructuredText's literals as Markdown's."""
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("``", "`")


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Part:
    """A generated part of a document."""

    document: str
    name: str
    text: Callable[[], str]


PARTS = (
    Part("../README.md", "headline", headline_text),
    Part("architecture.md", "house", house_text),
    Part("artifacts.md", "starts", starts_text),
    Part("coldstart.md", "phases", phases_text),
    Part("doctor.md", "doctor-checks", doctor_checks_text),
    Part("doctor.md", "bench-hops", bench_hops_text),
    Part("performance.md", "required", required_text),
    *(Part("performance.md", f"measured-{name}", partial(part_text, name)) for name in MEASURED),
    Part("performance.md", "scale", scale_text),
    Part("policy.md", "policy-numbers", policy_numbers_text),
    Part("policy.md", "policy-reasons", policy_reasons_text),
    Part("policy.md", "policy-verdicts", policy_verdicts_text),
    Part("reliability.md", "churn", churn_text),
    Part("reliability.md", "faults", faults_text),
    Part("reliability.md", "histories", histories_text),
    Part("scale.md", "fleet", fleet_text),
    Part("reference.md", "settings", settings_text),
    Part("reference.md", "cli", cli_text),
    Part("reference.md", "metrics", metrics_text),
    Part("reference.md", "rpcs", rpc_text),
    Part("reference.md", "errors", errors_text),
    Part("reference.md", "failures", failures_text),
    Part("reference.md", "client-errors", client_errors_text),
    Part("vllm.md", "vllm-options", vllm_options_text),
)


def generated(document: str, text: str) -> str:
    """The document's text with each of its parts made anew. Raises ValueError where the marks of one are missing."""
    for part in PARTS:
        if part.document != document:
            continue
        begin, end = f"<!-- begin {part.name} -->", f"<!-- end {part.name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            msg = f"{document} must hold {begin} and {end} once each"
            raise ValueError(msg)
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{BANNER}\n\n{part.text()}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """Writes, or with ``--check`` compares; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not fresh")
    check = parser.parse_args().check
    if not check:
        note_faults(FAULTS_NOTED, {})  # which tests there are now
    stale = 0
    for document in sorted({part.document for part in PARTS}):
        path = (DOCS / document).resolve()
        shown = path.relative_to(ROOT).as_posix()
        old = path.read_text(encoding="utf-8")
        new = generated(document, old)
        if old == new:
            continue
        stale += 1
        if check:
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), shown, "as generated")
            )
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{shown} was brought up to date")
    if check and stale:
        print("run: make docs", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
