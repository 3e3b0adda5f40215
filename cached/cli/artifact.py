"""`cached artifact`: compile caches saved, restored, listed and removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from cached.cli.connect import Globals, connected, pass_globals, timeout_option
from cached.cli.failures import NOT_FOUND
from cached.cli.output import ago, clean, output_option, print_json, print_pairs, print_table, say, size, to_data
from cached.errors import InvalidRequestError, NotFoundError
from cached.units import format_duration, format_size
from cached_client._proto import cached_pb2 as pb
from cached_client.artifacts import Difference, Missed, differences, environment_key
from cached_client.artifacts import restore as restore_artifact
from cached_client.artifacts import save as save_artifact
from cached_client.cache import Cache

_F = TypeVar("_F", bound=Callable[..., Any])
_SHOWN = 12
"""Digits of a name that a table shows, and that are enough to name an artifact."""


def _key_options(function: _F) -> _F:
    """What makes the key; the command gets ``key``."""
    for option in reversed(
        [
            click.option("--model", required=True, help="Name of the model that was compiled."),
            click.option("--engine", required=True, help="What compiled it: torch, vllm, tensorrt, …"),
            click.option("--revision", default="", help="Revision of the model."),
            click.option("--engine-version", default="", help="Version of the engine.  [that of the Python package]"),
            click.option(
                "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                help="Whether the key names a GPU, its architecture and driver.",
            ),
            click.option(
                "--key", "fields", metavar="NAME=VALUE", multiple=True,
                help="A further field, or another value for one; an empty value removes it. May be repeated.",
            ),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


def _key(
    model: str, engine: str, revision: str, engine_version: str, device: str, fields: tuple[str, ...]
) -> dict[str, str]:
    extra = {}
    for field in fields:
        name, separator, value = field.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{field!r}: write NAME=VALUE, such as dtype=bfloat16", param_hint="--key")
        extra[name] = value
    try:
        key = environment_key(model, engine, revision=revision, engine_version=engine_version, device=device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    return {name: value for name, value in {**key, **extra}.items() if value}


@click.group(short_help="Save and restore compile caches (torch.compile, Triton).")
def artifact() -> None:
    """Save and restore compile caches: torch.compile, Triton, vLLM, TensorRT.

    An artifact is found by its exact key: model, engine, versions, GPU, driver and processor. What is restored is code
    that the worker runs: see docs/artifacts.md on whom that means to trust.
    """


@artifact.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_key_options
@click.option("--replace", is_flag=True, help="Take the place of another archive of the same key.")
@timeout_option
@output_option
@pass_globals
def save(options: Globals, /, folder: Path, replace: bool, timeout: float | None, output: str, **parts: Any) -> None:
    """Save the compile cache in DIR.

    The daemon must allow it (artifacts.save). The same content is no work; other content under the same key stays
    unless --replace is given. The upload to artifacts.destination follows behind: `cached artifact ls` shows it.

    \b
    Example:
      cached artifact save ~/.cache/vllm/torch_compile_cache --model llama-13b --engine vllm
    """  # noqa: D301 click reads the control character
    key = _key(**parts)
    with connected(options) as connection:
        replaces = ""
        if replace:
            found = connection.call(connection.stub.FindArtifact, pb.FindArtifactRequest(key=key), timeout_s=timeout)
            replaces = found.artifact.sha256
        saved = save_artifact(Cache(connection), folder, key, replaces=replaces, timeout_s=timeout)
    if output == "json":
        print_json(asdict(saved))
        return
    for path in saved.left_out:
        say(f"left out: {path} (no regular file, or a path that no restore takes)")
    what = f"{saved.files} files, {format_size(saved.size_bytes)}"
    words = {
        "stored": f"saved {what} in {format_duration(saved.seconds)} as {saved.name}",
        "same": f"{what}: it was there already, as {saved.name}",
        "other": f"not saved: another archive of this key is current, {saved.name}; --replace takes its place",
        "busy": f"not saved: somebody else is saving {saved.name} right now",
    }
    click.echo(words.get(saved.outcome, saved.outcome))


@artifact.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_key_options
@timeout_option
@output_option
@pass_globals
def restore(options: Globals, /, folder: Path, timeout: float | None, output: str, **parts: Any) -> int:
    """Restore the compile cache of exactly this key to DIR.

    A DIR that is not there, or empty, appears whole; to one with files what is missing is added. Exit code 3, with what
    the nearest artifact has otherwise, if there is none of this key.

    \b
    Example:
      cached artifact restore ~/.cache/vllm/torch_compile_cache --model llama-13b --engine vllm
    """  # noqa: D301 click reads the control character
    with connected(options) as connection:
        answer = restore_artifact(Cache(connection), folder, _key(**parts), timeout_s=timeout)
    if output == "json":
        print_json({"restored": not isinstance(answer, Missed), **asdict(answer)})
    elif isinstance(answer, Missed):
        say(f"not restored: {answer.reason}")
        if answer.differences:
            _print_differences(answer.nearest, answer.differences)
    else:
        kept = f" ({answer.kept_files} were there already)" if answer.kept_files else ""
        took = format_duration(answer.seconds)
        click.echo(
            f"restored {answer.added_files} files{kept}, {format_size(answer.size_bytes)}, in {took} to {folder}"
        )
    return NOT_FOUND if isinstance(answer, Missed) else 0


def _print_differences(nearest: str, differing: tuple[Difference, ...]) -> None:
    rows = [(item.field, item.wanted or "-", item.found or "-") for item in differing]
    print_table(("FIELD", "WANTED", f"HAS {nearest.removeprefix('artifact.')[:_SHOWN]}"), rows)


@artifact.command()
@click.option("--remote", is_flag=True, help="Also those that are only at artifacts.destination.")
@output_option
@pass_globals
def ls(options: Globals, remote: bool, output: str) -> None:
    """List the compile artifacts: for what each is, and where.

    AT is where it is on this host, and S3 (or FILE) once it is at the destination. FIELDS has what tells it from others
    of its model and engine. `-o json` shows whole keys.

    Example: cached artifact ls
    """
    with connected(options) as connection:
        request = pb.ListArtifactsRequest(remote=remote)
        response = connection.call(connection.stub.ListArtifacts, request, timeout_s=None)  # the destination's time
    if output == "json":
        print_json([to_data(item) for item in response.artifacts])
        return
    rows = [
        (
            item.name.removeprefix("artifact.")[:_SHOWN],
            item.key["model"],
            " ".join(filter(None, (item.key["engine"], item.key.get("engine_version", "")))),
            " ".join(filter(None, (item.key.get("gpu_arch", "cpu"), item.key.get("driver", "")))),
            size(item.size_bytes),
            ago(item.saved_time_s),
            _where(item),
            _told_apart(item, list(response.artifacts)),
        )
        for item in response.artifacts
    ]
    columns = ("ARTIFACT", "MODEL", "ENGINE", "GPU", "SIZE", "SAVED", "AT", "FIELDS")
    shown = len(columns) if any(row[-1] for row in rows) else -1
    print_table(
        columns[:shown], [row[:shown] for row in rows], right=("SIZE", "SAVED"), folding=("MODEL", "AT", "FIELDS")
    )


def _where(item: pb.Artifact) -> str:
    words = [pb.Level.Name(level).removeprefix("LEVEL_") for level in item.levels]
    if item.source:
        words.append(item.source.partition("://")[0].upper())
    elif item.upload_error:
        words.append(f"(not uploaded: {item.upload_error})")
    return " ".join(words) or "-"


def _told_apart(item: pb.Artifact, items: list[pb.Artifact]) -> str:
    shown = {"model", "engine", "engine_version", "gpu_arch", "driver"}
    like = [other for other in items if all(other.key.get(name) == item.key.get(name) for name in ("model", "engine"))]
    names = {diff.field for other in like for diff in differences(dict(item.key), dict(other.key))} - shown
    return ", ".join(f"{name}={item.key.get(name, '')}" for name in sorted(names))


@artifact.command()
@click.argument("name", metavar="ARTIFACT")
@output_option
@pass_globals
def rm(options: Globals, name: str, output: str) -> None:
    """Remove a compile artifact from this host.

    ARTIFACT is its name, or the beginning of it that `cached artifact ls` shows. What is at the destination stays
    there, and is found again: the command says where that is.

    Example: cached artifact rm 3f9ab2c41d07
    """
    with connected(options) as connection:
        known = connection.call(connection.stub.ListArtifacts, pb.ListArtifactsRequest()).artifacts
        found = _named(name, known)
        freed = connection.call(connection.stub.Remove, pb.RemoveRequest(ref=found.name), timeout_s=None)
    if output == "json":
        print_json(to_data(freed))
        return
    click.echo(f"{found.name}: freed {format_size(freed.l2_freed_bytes)} of disk")
    if found.source:
        say(f"it is still at {found.source}: remove it there, too, if it must not come back")


def _named(name: str, known: Sequence[pb.Artifact]) -> pb.Artifact:
    """The one whose name begins so. Raises NotFoundError, and InvalidRequestError for several."""
    digits, hint = name.removeprefix("artifact."), "`cached artifact ls` shows them"
    found = [item for item in known if item.name.removeprefix("artifact.").startswith(digits)] if digits else []
    if not found:
        raise NotFoundError(f"there is no artifact {name!r} here", hint=hint, ref=name)
    if len(found) > 1:
        raise InvalidRequestError(f"{len(found)} artifacts begin with {name!r}", hint=hint, value=name)
    return found[0]


@artifact.command()
@_key_options
@output_option
def key(output: str, **parts: Any) -> None:
    """Show the key that save and restore would use here. Needs no daemon.

    Example: cached artifact key --model llama-13b --engine vllm
    """
    made = _key(**parts)
    if output == "json":
        print_json(made)
    else:
        print_pairs({name: clean(value) for name, value in made.items()})
