"""The command: chooses the checks, runs them, and prints what they found."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from cached.cli.connect import Globals, connected, pass_globals
from cached.cli.doctor import host, worker
from cached.cli.doctor.checks import Check, Context, Finding, Verdict, run_checks
from cached.cli.failures import FAILED
from cached.cli.output import clean, output_option, print_json
from cached.config import process_environment

CHECKS = (
    Check("daemon", "the daemon answers", host.daemon),
    Check("sockets", "its sockets are there, and open to those who should use them", host.sockets),
    Check("shared-memory", "the mount has room for L1", host.shared_memory),
    Check("huge-pages", "filling shared memory is fast", host.huge_pages, experiment=True),
    Check("bytecode", "imports need not compile", worker.bytecode, experiment=True),
    Check("threads", "as many threads as processors", worker.threads, experiment=True),
    Check("cuda-modules", "how CUDA loads its kernels", worker.cuda_modules, experiment=True),
    Check("hub", "nothing waits for a hub that is not there", worker.hub, experiment=True),
)
_COLOURS = {Verdict.OK: "green", Verdict.ADVICE: "yellow", Verdict.PROBLEM: "bold red", Verdict.NOT_MEASURED: "dim"}


@click.command(short_help="Look at this host, and say what would help.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([check.name for check in CHECKS]),
    help="Only this check; may be repeated.",
)
@click.option("--quick", is_flag=True, help="Only look; leave out what runs experiments for seconds.")
@click.option(
    "--python", default=sys.executable, metavar="PATH", help="The workers' interpreter.  [default: this command's own]"
)
@output_option
@pass_globals
def doctor(options: Globals, only: tuple[str, ...], quick: bool, python: str, output: str) -> int:
    """Look at this host and at how workers start on it, and tell what would help. Exit code 1 if there is a problem.

    Advice is measured: each piece comes from a short experiment in a child process, with the environment that this
    command was started with. So start it as workers are started: as their user, with their environment, and with their
    interpreter. The check of the hub connects to huggingface.co (or HF_ENDPOINT). Needs half a minute.

    \b
    Examples:
      cached doctor
      cached doctor --quick
      cached doctor --python /opt/worker/bin/python --only bytecode --only threads -o json
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        socket = str(cache.path)
    context = Context(options, socket, python, process_environment())
    chosen = [check for check in CHECKS if (not only or check.name in only) and not (quick and check.experiment)]
    found: list[tuple[Check, Finding]] = []
    for check, finding in run_checks(chosen, context):
        found.append((check, finding))
        if output == "table":
            _print_finding(check, finding)
    problems = sum(finding.verdict is Verdict.PROBLEM for _, finding in found)
    if output == "json":
        print_json({"problems": problems, "findings": [_data(*pair) for pair in found]})
    else:
        advice = sum(finding.verdict is Verdict.ADVICE for _, finding in found)
        click.echo(f"\n{_count(problems, 'problem')}, {_count(advice, 'piece')} of advice")
    return FAILED if problems else 0


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _data(check: Check, finding: Finding) -> dict[str, Any]:
    return {
        "check": check.name,
        "about": check.about,
        "verdict": finding.verdict,
        "told": finding.told,
        "measured": dict(finding.measured),
        "mend": finding.mend,
    }


def _print_finding(check: Check, finding: Finding) -> None:
    """At once: some of them take seconds."""
    console = Console(highlight=False, soft_wrap=True)
    verdict = Text(f"{finding.verdict:<13}", style=_COLOURS[finding.verdict])
    console.print(Text.assemble(verdict, (f"{check.name:<14}", "bold"), clean(finding.told)))
    if finding.mend:
        console.print(Text.assemble(" " * 27, ("→ ", "cyan"), clean(finding.mend)))
