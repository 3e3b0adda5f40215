"""The verbs that read and set what is known of models."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import click

from cached.cli.connect import Globals, connected, pass_globals, ref_argument
from cached.cli.output import (
    ago,
    clean,
    enum_word,
    output_option,
    print_json,
    print_pairs,
    print_table,
    print_text,
    short,
    size,
    to_data,
)
from cached.cli.when import told
from cached.refs import artifact_digest
from cached.units import format_duration, format_size
from cached_client._proto import cached_pb2 as pb

TIERS = ("hot", "warm", "cold", "auto")
_NAMED = 5
"""Of the models that would go before one; JSON has more of them."""


@click.command(short_help="List the models: where each is, and what it is worth.")
@click.option("-w", "--wide", is_flag=True, help="Also the revision, tenant and source.")
@click.option("-a", "--all", "everything", is_flag=True, help="Also compile artifacts (see `cached artifact ls`).")
@output_option
@pass_globals
def ls(options: Globals, wide: bool, everything: bool, output: str) -> None:
    """List all models that the cache knows: where each is, by whose word, and what it is worth.

    BY is who said its tier. VALUE is the waiting that its being in memory (else on disk) is expected to spare in the
    next six hours: see `cached show`. IDLE is how long no worker has had it. A transient model goes with its last
    lease. On a narrow terminal some columns are left out.

    \b
    Examples:
      cached ls
      cached ls --wide
      cached ls -o json
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        known = cache.call(cache.stub.List, pb.ListRequest()).models
    models = [model for model in known if everything or not artifact_digest(model.name)]
    if output == "json":
        print_json([to_data(model) for model in models])
        return
    # What nothing is said in takes no room.
    columns = [*_COLUMNS, *([] if wide else ["NOTES"]), *(_WIDE_COLUMNS if wide else ())]
    rows = [_row(model) for model in models]
    shown = [name for name in columns if name != "NOTES" or any(row[name] for row in rows)]
    print_table(
        shown,
        [[row[name] for name in shown] for row in rows],
        right=("VALUE", "IDLE", "SIZE", "L1", "L2", "LEASES"),
        spare=() if wide else [name for name in ("SIZE", "LEASES", "BY", "IDLE") if name in shown],
        folding=("MODEL", "NOTES", "TENANT", "SOURCE"),
    )


_COLUMNS = ("MODEL", "STATE", "TIER", "BY", "VALUE", "IDLE", "SIZE", "L1", "L2", "LEASES")
_WIDE_COLUMNS = ("NOTES", "REVISION", "TENANT", "SOURCE")


def _row(model: pb.ModelSummary) -> dict[str, str]:
    return {
        "MODEL": model.name,
        "STATE": _state(model),
        "TIER": enum_word(model, "tier"),
        "BY": model.tier_from,
        "VALUE": format_duration(model.worth_s) if model.worth_s else "-",
        "IDLE": "in use" if model.lease_count else ago(model.last_used_time_s).removesuffix(" ago"),
        "SIZE": size(model.size_bytes),
        "L1": size(model.l1_bytes),
        "L2": size(model.l2_bytes),
        "LEASES": str(model.lease_count),
        "NOTES": ", ".join(_marks(model)),
        "REVISION": short(model.revision) or "-",
        "TENANT": model.tenant or "-",
        "SOURCE": model.source,
    }


def _marks(model: pb.ModelSummary) -> list[str]:
    marks = [("pinned", model.pinned), ("transient", model.transient), (f"adapter of {model.base}", model.base)]
    return [word for word, holds in marks if holds]


def _state(model: pb.ModelSummary) -> str:
    word = enum_word(model, "state")
    return f"{word} {model.progress:.0%}" if 0 < model.progress < 1 else word


@click.command()
@output_option
@pass_globals
def ps(options: Globals, output: str) -> None:
    """List the leases: which worker holds which model.

    PROCESS is what the kernel calls the worker, with the pod, container or service that it runs in, where the daemon
    can see that; CLIENT is what it calls itself.

    Example: cached ps
    """
    with connected(options) as cache:
        leases = cache.call(cache.stub.ListLeases, pb.ListLeasesRequest()).leases
    if output == "json":
        print_json([to_data(lease) for lease in leases])
        return
    _print_leases(leases)


def _print_leases(leases: Iterable[pb.Lease]) -> None:
    rows = [
        (
            lease.lease_id,
            f"{lease.name}@{short(lease.revision)}",
            "complete" if lease.complete else "loading",
            size(lease.size_bytes),
            lease.client_name,
            str(lease.peer_pid if lease.peer_pid > 0 else lease.client_pid),
            str(lease.peer_uid) if lease.peer_uid >= 0 else "-",
            " in ".join(part for part in (lease.process, lease.container) if part) or "-",
            ago(lease.since_time_s),
        )
        for lease in leases
    ]
    print_table(
        ("LEASE", "MODEL", "STATE", "SIZE", "CLIENT", "PID", "UID", "PROCESS", "SINCE"),
        rows,
        right=("SIZE", "PID", "UID"),
        spare=("SIZE", "STATE"),
        folding=("MODEL", "CLIENT", "PROCESS"),
    )


@click.command()
@ref_argument
@output_option
@pass_globals
def show(options: Globals, ref: str, output: str) -> None:
    """Show all that is known of a model, and why it is where it is.

    Of each level: what of it is there, what that is worth (the waiting that it is expected to spare in the next six
    hours), which models would be evicted before it, and what was decided last. Also its files and what they were
    checked against, leases, hot windows, pulls that begin later, notes, and why the last pull failed.

    \b
    Examples:
      cached show llama-13b
      cached show llama-13b -o json
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        detail = cache.call(cache.stub.Describe, pb.DescribeRequest(ref=ref))
    if output == "json":
        print_json(to_data(detail))
        return
    print_pairs(_facts(detail))
    for note in detail.notes:
        print_pairs({"note": note})
    if detail.places:
        click.echo()
        _print_places(detail)
    if detail.files:
        click.echo()
        _print_files(detail)
    if detail.leases:
        click.echo()
        _print_leases(detail.leases)


def _facts(detail: pb.DescribeResponse) -> dict[str, str]:
    model = detail.summary
    marks = [f"tenant {model.tenant}"] if model.tenant else []
    return {
        "model": model.name,
        "revision": model.revision,
        "state": _state(model),
        "tier": ", ".join([f"{enum_word(model, 'tier')} (by {model.tier_from})", *_marks(model), *marks]),
        "priority": str(model.priority) if model.priority else "",
        "size": f"{format_size(model.size_bytes)} in {model.file_count} files",
        "in memory": size(model.l1_bytes),
        "on disk": size(model.l2_bytes),
        "source": model.source,
        "checked by": model.checked_by,
        "last used": ago(model.last_used_time_s),
        "hot": "; ".join(detail.schedule),
        "hot changes": _told(detail.schedule_change_time_s) if detail.schedule_change_time_s else "",
        "pulled at": "; ".join(map(_told, detail.pull_times_s)),
        "path": detail.path,
        "revisions": ", ".join(map(short, detail.revisions)) if len(detail.revisions) > 1 else "",
        "last error": detail.last_error,
    }


def _told(time_s: float) -> str:
    return told(time_s, datetime.now().astimezone())


def _print_places(detail: pb.DescribeResponse) -> None:
    rows = [
        (
            enum_word(place, "level").upper(),
            size(place.held_bytes),
            format_duration(place.worth_s),
            f"{place.requests:.2f}",
            format_duration(place.reload_s),
            ago(place.verified_time_s) if place.held_bytes else "-",
            _before(place),
        )
        for place in detail.places
    ]
    columns = ("AT", "HOLDS", "WORTH", "REQUESTS IN 6H", "EACH WAITS", "VERIFIED", "EVICTED BEFORE IT")
    print_table(columns, rows, right=columns[1:5], folding=columns[6:])
    for place in detail.places:
        print_text(place.why)


def _before(place: pb.Place) -> str:
    more = place.evicted_before_count - len(place.evicted_before[:_NAMED])
    named = [*place.evicted_before[:_NAMED], *([f"{more} more"] if more else [])]
    return ", ".join(named) or "-"


def _print_files(detail: pb.DescribeResponse) -> None:
    rows = [
        (
            file.path,
            size(file.size_bytes),
            file.sha256[:16] or "-",
            " ".join(word for word, is_in in (("L1", file.in_l1), ("L2", file.in_l2)) if is_in) or "-",
            file.checked_by,
            ", ".join(file.shared_with),
        )
        for file in detail.files
    ]
    print_table(("FILE", "SIZE", "SHA-256", "AT", "CHECKED BY", "SHARED WITH"), rows, right=("SIZE",))


@click.command()
@ref_argument
@click.argument("wanted", metavar="|".join(TIERS), type=click.Choice(TIERS))
@click.option("--what-if", is_flag=True, help="Change nothing; only say what would be loaded and what would leave.")
@output_option
@pass_globals
def tier(options: Globals, ref: str, wanted: str, what_if: bool, output: str) -> None:
    """Set how soon a model is wanted.

    hot: always in memory, within the budget for hot models. warm: a request for it counts more than one for others, and
    it keeps its place longer. cold: in memory only while it is leased, and the first to leave. auto: what it is worth
    decides. The stronger of this and the catalog's tier counts.

    \b
    Examples:
      cached tier llama-13b hot
      cached tier llama-13b hot --what-if
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        request = pb.SetTierRequest(ref=ref, tier=f"TIER_{wanted.upper()}", what_if=what_if)
        answer = cache.call(cache.stub.SetTier, request)
    if not what_if:
        _print_summary(answer.summary, output)
    elif output == "json":
        print_json(to_data(answer))
    else:
        _print_what_if(answer)


def _print_what_if(answer: pb.SetTierResponse) -> None:
    model = answer.summary
    click.echo(f"{clean(model.name)} would be {enum_word(model, 'tier')} (by {model.tier_from}).")
    unknown = enum_word(model, "tier") == "hot" and not model.size_bytes
    click.echo("To load: nobody knows yet how large it is" if unknown else f"To load: {size(answer.loaded_bytes)}")
    if not answer.evictions:
        click.echo("Nothing would leave.")
        return
    click.echo(f"Would leave: {format_size(sum(item.frees_bytes for item in answer.evictions))}\n")
    rows = [
        (enum_word(item, "level").upper(), item.name, size(item.frees_bytes), item.reason, item.why)
        for item in answer.evictions
    ]
    print_table(("FROM", "MODEL", "FREES", "REASON", "WHY"), rows, right=("FREES",), folding=("MODEL", "WHY"))


@click.command()
@ref_argument
@output_option
@pass_globals
def pin(options: Globals, ref: str, output: str) -> None:
    """Protect a model from eviction, at every level.

    Example: cached pin llama-13b
    """
    with connected(options) as cache:
        _print_summary(cache.call(cache.stub.Pin, pb.PinRequest(ref=ref)).summary, output)


@click.command()
@ref_argument
@output_option
@pass_globals
def unpin(options: Globals, ref: str, output: str) -> None:
    """End the protection that `cached pin` gave.

    Example: cached unpin llama-13b
    """
    with connected(options) as cache:
        _print_summary(cache.call(cache.stub.Unpin, pb.UnpinRequest(ref=ref)).summary, output)


def _print_summary(model: pb.ModelSummary, output: str) -> None:
    if output == "json":
        print_json(to_data(model))
        return
    pinned = ", pinned" if model.pinned else ""
    click.echo(f"{model.name}: {enum_word(model, 'tier')} (by {model.tier_from}){pinned}")


@click.command()
@ref_argument
@click.option("--level", type=click.Choice(["l1", "l2", "all"]), default="all", show_default=True, help="Where from.")
@output_option
@pass_globals
def evict(options: Globals, ref: str, level: str, output: str) -> None:
    """Take a model out of memory, off the disk, or both.

    It stays known, and can be pulled again.

    Example: cached evict llama-13b --level l1
    """
    chosen = "LEVEL_UNSPECIFIED" if level == "all" else f"LEVEL_{level.upper()}"
    with connected(options) as cache:
        freed = cache.call(cache.stub.Evict, pb.EvictRequest(ref=ref, level=chosen), timeout_s=None)
    _print_freed(ref, freed, output)


@click.command()
@ref_argument
@output_option
@pass_globals
def rm(options: Globals, ref: str, output: str) -> None:
    """Evict a model from every level and forget it.

    Example: cached rm llama-13b
    """
    with connected(options) as cache:
        freed = cache.call(cache.stub.Remove, pb.RemoveRequest(ref=ref), timeout_s=None)
    _print_freed(ref, freed, output)


def _print_freed(ref: str, freed: pb.EvictResponse | pb.RemoveResponse, output: str) -> None:
    if output == "json":
        print_json(to_data(freed))
        return
    memory, disk = format_size(freed.l1_freed_bytes), format_size(freed.l2_freed_bytes)
    click.echo(f"{ref}: freed {memory} of memory, {disk} of disk")
