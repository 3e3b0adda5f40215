"""`cached pull` and `cached verify`: long work in the daemon, watched."""

from __future__ import annotations

from datetime import datetime
from math import inf, isfinite

import click

from cached.cli.connect import (
    Globals,
    connected,
    optional_ref_argument,
    pass_globals,
    ref_argument,
    timeout_option,
)
from cached.cli.failures import INTEGRITY
from cached.cli.models import TIERS
from cached.cli.output import clean, enum_word, output_option, print_json, print_table, rate, say, short, to_data
from cached.cli.progress import meter
from cached.cli.when import parse_when, told
from cached.errors import UnavailableError
from cached.units import format_duration, format_size
from cached_client._proto import cached_pb2 as pb

_ENDS = (pb.PullProgress.PHASE_READY, pb.PullProgress.PHASE_ACCEPTED, pb.PullProgress.PHASE_SCHEDULED)
_TAKEN_BACK = "no pull of it will begin by itself"
_FROM_WORDS = {"l2": "disk", "l3": "the origin"}


@click.command()
@ref_argument
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="URI",
    help="Origin of a model that is not in the catalog. Several make a chain: nearer places of the same files first, "
    "which are asked for bytes before the last one, whose word counts.",
)
@click.option("--tier", type=click.Choice(TIERS), help="Set how soon the model is wanted from now on.")
@click.option(
    "--level",
    type=click.Choice(["l1", "l2"]),
    default="l1",
    show_default=True,
    help="Bring it to memory (l1; also written to disk) or only to disk (l2).",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is ready, or only begin.")
@click.option(
    "--at",
    "at",
    default="",
    metavar="TIME",
    help="Begin then, also if the daemon is restarted: 08:00, 2026-11-22T08:00, +2h. never: take back such pulls.",
)
@timeout_option
@output_option
@pass_globals
def pull(
    options: Globals,
    ref: str,
    sources: tuple[str, ...],
    tier: str | None,
    level: str,
    wait: bool,
    at: str,
    timeout: float | None,
    output: str,
) -> None:
    """Bring a model into the cache, and show how far it is.

    REF is NAME, NAME@REVISION or a URI. Interrupting the command does not end the pull. With --at the daemon begins it
    by itself; `cached show` lists such pulls. A time of day is the next one on this host's clock. If the daemon is not
    there then, it begins when it is back.

    \b
    Examples:
      cached pull llama-13b
      cached pull tiny --source s3://bucket/models/tiny --tier hot
      cached pull llama-13b --at 06:30
      cached pull tiny --source file:///mnt/mirror/tiny --source s3://bucket/models/tiny
    """  # noqa: D301 click reads the control character
    now = datetime.now().astimezone()
    at_time_s = parse_when(at, now) if at else 0.0
    request = pb.PullRequest(
        ref=ref,
        source=" ".join(sources),
        tier=f"TIER_{tier.upper()}" if tier else "TIER_UNSPECIFIED",
        level=f"LEVEL_{level.upper()}",
        no_wait=not wait,
        at_time_s=at_time_s,
    )
    last: pb.PullProgress | None = None
    with connected(options) as cache, meter(quiet=output == "json") as bar:
        for response in cache.stream(cache.stub.Pull, request, timeout_s=timeout):
            last = response.progress
            bar.update(f"{last.name or ref}: {enum_word(last, 'phase')}", last.done_bytes, last.total_bytes)
    if last is None or last.phase not in _ENDS:
        raise UnavailableError("the daemon ended the pull without a result", hint="see `cached events`, and pull again")
    if output == "json":
        print_json(to_data(last) | ({"at_time_s": at_time_s if isfinite(at_time_s) else None} if at else {}))
        return
    if at_time_s:
        click.echo(clean(f"{last.name}: {_TAKEN_BACK if at_time_s == inf else f'pulled at {told(at_time_s, now)}'}"))
        return
    click.echo(clean(_told(last)))
    for note in last.notes:
        say(f"note: {note}")


def _told(last: pb.PullProgress) -> str:
    named = f"{last.name}@{short(last.revision)}" if last.revision else last.name
    if last.phase == pb.PullProgress.PHASE_ACCEPTED:
        return f"{named}: accepted, goes on in the background (see `cached ls`)"
    speed = rate(last.total_bytes, last.elapsed_s)
    where = _FROM_WORDS.get(enum_word(last, "from_level"), "")
    parts = [f"{named}: {format_size(last.total_bytes)}"]
    if where:
        parts.append(f" in {format_duration(last.elapsed_s)}" + (f" ({speed})" if speed else "") + f" from {where}")
    else:
        parts.append(", there already")
    parts.append(f", checked by {last.checked_by}" if last.checked_by else "")
    return "".join(parts)


@click.command()
@optional_ref_argument
@click.option("--repair", is_flag=True, help="Fetch damaged chunks again.")
@output_option
@pass_globals
def verify(options: Globals, ref: str, repair: bool, output: str) -> int:
    """Compare every byte with its checksum.

    Of one model, or of all. Lists each damaged chunk. Exit code 6 if damage remains.

    Example: cached verify llama-13b --repair
    """
    damages: list[pb.Damage] = []
    last = pb.VerifyResponse()
    with connected(options) as cache, meter(quiet=output == "json") as bar:
        for last in cache.stream(cache.stub.Verify, pb.VerifyRequest(ref=ref, repair=repair)):
            if last.HasField("damage"):
                damages.append(last.damage)
                bar.line(f"damaged: {_place(last.damage)}")
            bar.update(f"verifying {ref or 'all models'}", last.done_bytes, last.total_bytes)
    if not last.finished:
        raise UnavailableError("the daemon ended the verification early", hint="see `cached events`, and verify again")
    if output == "json":
        print_json(to_data(last) | {"damage": [to_data(item) for item in damages]})
    else:
        _print_verdict(last, damages)
    return INTEGRITY if last.damaged_chunks > last.repaired_chunks else 0


def _place(damage: pb.Damage) -> str:
    return f"{damage.name} {damage.path}, {enum_word(damage, 'level').upper()} chunk {damage.chunk_index}"


def _print_verdict(last: pb.VerifyResponse, damages: list[pb.Damage]) -> None:
    if damages:
        rows = [
            (
                f"{item.name}@{short(item.revision)}",
                item.path,
                enum_word(item, "level").upper(),
                str(item.chunk_index),
                f"{item.offset_bytes}-{item.offset_bytes + item.length_bytes - 1}",
                "yes" if item.repaired else f"no: {item.error}" if item.error else "no",
            )
            for item in damages
        ]
        print_table(("MODEL", "FILE", "LEVEL", "CHUNK", "BYTES", "REPAIRED"), rows, right=("CHUNK",))
    found = f"{last.damaged_chunks} damaged, {last.repaired_chunks} repaired" if last.damaged_chunks else "no damage"
    click.echo(f"verified {format_size(last.done_bytes)}: {found}")
