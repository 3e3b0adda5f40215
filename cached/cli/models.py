"""The verbs that read and set what is known of models."""

from __future__ import annotations

from collections.abc import Iterable

import click

from cached.cli.connect import Globals, connected, pass_globals, ref_argument
from cached.cli.failures import NOT_FOUND
from cached.cli.output import (
    ago,
    enum_word,
    output_option,
    print_json,
    print_pairs,
    print_table,
    say,
    short,
    size,
    to_data,
)
from cached.units import format_size
from cached_client._proto import cached_pb2 as pb

TIERS = ("hot", "warm", "cold", "auto")


@click.command()
@output_option
@pass_globals
def ls(options: Globals, output: str) -> None:
    """List all models that the cache knows.

    Example: cached ls
    """
    with connected(options) as cache:
        models = cache.call(cache.stub.List, pb.ListRequest()).models
    if output == "json":
        print_json([to_data(model) for model in models])
        return
    columns = ("MODEL", "REVISION", "STATE", "TIER", "SIZE", "L1", "L2", "LEASES", "USED", "SOURCE")
    print_table(columns, [_row(model) for model in models], right=("SIZE", "L1", "L2", "LEASES"))


def _row(model: pb.ModelSummary) -> tuple[str, ...]:
    return (
        model.name,
        short(model.revision) or "-",
        _state(model),
        enum_word(model, "tier") + (" pinned" if model.pinned else ""),
        size(model.size_bytes),
        size(model.l1_bytes),
        size(model.l2_bytes),
        str(model.lease_count),
        ago(model.last_used_time_s),
        model.source,
    )


def _state(model: pb.ModelSummary) -> str:
    word = enum_word(model, "state")
    return f"{word} {model.progress:.0%}" if 0 < model.progress < 1 else word


@click.command()
@output_option
@pass_globals
def ps(options: Globals, output: str) -> None:
    """List the leases: which worker holds which model.

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
            ago(lease.since_time_s),
        )
        for lease in leases
    ]
    print_table(
        ("LEASE", "MODEL", "STATE", "SIZE", "CLIENT", "PID", "UID", "SINCE"), rows, right=("SIZE", "PID", "UID")
    )


@click.command()
@ref_argument
@output_option
@pass_globals
def show(options: Globals, ref: str, output: str) -> None:
    """Show all that is known of a model: files, checks, leases, notes.

    Example: cached show llama-13b
    """
    with connected(options) as cache:
        detail = cache.call(cache.stub.Describe, pb.DescribeRequest(ref=ref))
    if output == "json":
        print_json(to_data(detail))
        return
    model = detail.summary
    print_pairs(
        {
            "model": model.name,
            "revision": model.revision,
            "state": _state(model),
            "tier": f"{enum_word(model, 'tier')} (by {model.tier_from})" + (", pinned" if model.pinned else ""),
            "size": f"{format_size(model.size_bytes)} in {model.file_count} files",
            "in memory": size(model.l1_bytes),
            "on disk": size(model.l2_bytes),
            "source": model.source,
            "checked by": model.checked_by,
            "last used": ago(model.last_used_time_s),
            "path": detail.path,
            "revisions": ", ".join(map(short, detail.revisions)) if len(detail.revisions) > 1 else "",
            "last error": detail.last_error,
        }
    )
    for note in detail.notes:
        print_pairs({"note": note})
    if detail.files:
        click.echo()
        _print_files(detail)
    if detail.leases:
        click.echo()
        _print_leases(detail.leases)


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
@output_option
@pass_globals
def tier(options: Globals, ref: str, wanted: str, output: str) -> None:
    """Set how soon a model is wanted.

    hot: always in memory. warm: in memory until the room is needed and it was not used for longest, then on disk. cold:
    in memory only while it is leased, and the first to leave. auto: for now as warm. The stronger of this and the
    catalog's tier counts.

    Example: cached tier llama-13b hot
    """
    with connected(options) as cache:
        request = pb.SetTierRequest(ref=ref, tier=f"TIER_{wanted.upper()}")
        _print_summary(cache.call(cache.stub.SetTier, request).summary, output)


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
        freed = cache.call(cache.stub.Evict, pb.EvictRequest(ref=ref, level=chosen))
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
        freed = cache.call(cache.stub.Remove, pb.RemoveRequest(ref=ref))
    _print_freed(ref, freed, output)


def _print_freed(ref: str, freed: pb.EvictResponse | pb.RemoveResponse, output: str) -> None:
    if output == "json":
        print_json(to_data(freed))
        return
    memory, disk = format_size(freed.l1_freed_bytes), format_size(freed.l2_freed_bytes)
    click.echo(f"{ref}: freed {memory} of memory, {disk} of disk")


@click.command()
@ref_argument
@pass_globals
def path(options: Globals, ref: str) -> int:
    """Print the directory of a model in the cache.

    For programs that want files. Exit code 3 if the model is not in the cache. The directory holds links, and stays
    whole while the model is leased or pinned: see `cached run` and `cached pin`.

    Example: llama-server -m "$(cached path qwen-gguf)"/model.gguf
    """
    with connected(options) as cache:
        detail = cache.call(cache.stub.Describe, pb.DescribeRequest(ref=ref))
    if detail.path:
        click.echo(detail.path)
        return 0
    say(f"{ref} is not in the cache; bring it with: cached pull {ref}")
    return NOT_FOUND
