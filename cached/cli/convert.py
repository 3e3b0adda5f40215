"""`cached convert`: a pickled checkpoint to safetensors. Needs no daemon."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from cached.cli.output import SizeType, clean, output_option, print_json, say
from cached.cli.progress import meter
from cached.config import load_config, origin_defaults, process_environment
from cached.convert.checkpoint import plan_conversion
from cached.convert.fetch import fetch
from cached.convert.run import Converted, Watcher, convert, written
from cached.convert.sandbox import Measure
from cached.errors import IntegrityError, InvalidRequestError
from cached.origins.base import OriginSpec
from cached.units import format_size
from cached_client.errors import CacheError
from cached_client.safetensors_header import header_length, parse_header


@click.command("convert")
@click.argument("source", metavar="DIR|FILE|URI")
@click.option("--to", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--max-shard-size", type=SizeType(), default="2GB", show_default=True, help="Also bounds the memory it takes."
)
@click.option(
    "--drop-shared", is_flag=True, help="Leave out tensors that are the same as another, such as tied weights."
)
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration file, for how to reach a URI.")
@click.option("--require-sandbox", is_flag=True, help="Refuse to read anything unless the sandbox is whole.")
@output_option
def convert_command(
    source: str,
    folder: Path,
    max_shard_size: int,
    drop_shared: bool,
    file: Path | None,
    require_sandbox: bool,
    output: str,
) -> None:
    """Convert a checkpoint of .bin, .pt or .pth files to safetensors.

    Such files are pickles, which may run code when they are loaded. They are read with torch's weights_only, in a
    process without network, credentials and the right to write anywhere but in the new folder, as far as this kernel
    lets it: what of that is active is printed. Every tensor is compared after it was written; configuration and
    tokenizer are copied; DIR is there whole or not at all. Needs torch and safetensors: pip install 'cached[convert]'

    The checkpoint of a URI (s3://, hf://, …) is downloaded beside DIR first, verified, and removed afterwards.

    \b
    Example:
      cached convert ./llama-bin --to ./llama && cached push ./llama s3://bucket/models/llama
    """  # noqa: D301 click reads the control character
    with contextlib.ExitStack() as stack:
        place = Path(source)
        if "://" in source:
            beside = folder.absolute().parent
            with written(folder):
                beside.mkdir(parents=True, exist_ok=True)
                near = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".source", dir=beside)
            place = Path(stack.enter_context(near))
            _fetch(source, place, file, quiet=output == "json")
        made = _convert(
            place, folder, max_shard_size, quiet=output == "json", drop=drop_shared, require=require_sandbox
        )
    for path in made.files:
        _check_header(made.folder / path, made.files[path])
    _show(made, folder, output)


def _fetch(uri: str, near: Path, file: Path | None, *, quiet: bool) -> None:
    config = load_config(file, process_environment(), {}).config
    spec = OriginSpec(uri, origin_defaults(config).get(uri.partition("://")[0].lower(), {}))
    fetched_bytes = 0
    with meter(quiet=quiet) as bar:

        def on_bytes(count: int) -> None:
            nonlocal fetched_bytes
            fetched_bytes += count
            bar.update("downloading", fetched_bytes, 0)

        fetch(spec, near, on_bytes)


def _convert(source: Path, folder: Path, max_shard_bytes: int, *, quiet: bool, drop: bool, require: bool) -> Converted:
    total_bytes = sum(checkpoint.size_bytes for checkpoint in plan_conversion(source).checkpoints)
    written_bytes = 0
    with meter(quiet=quiet) as bar:

        def on_bytes(count: int) -> None:
            nonlocal written_bytes
            written_bytes += count
            bar.update("converting", min(written_bytes, total_bytes), total_bytes)

        return convert(
            source.resolve(),
            folder.resolve(),
            max_shard_bytes=max_shard_bytes,
            drop_shared=drop,
            env=process_environment(),
            watcher=Watcher(on_bytes, lambda measures: _sandboxed(measures, require=require)),
        )


def _sandboxed(measures: list[Measure], *, require: bool) -> None:
    """Tells what of the sandbox is active, and loudly what is not."""
    active = [item.name for item in measures if item.active]
    inactive = [f"{item.name} ({item.why})" for item in measures if not item.active]
    say(f"sandbox: {', '.join(active) or 'nothing'}")
    if inactive:
        say(f"WARNING: this kernel or container does not allow: {', '.join(inactive)}")
    if inactive and require:
        raise InvalidRequestError(
            f"the sandbox is not whole: {', '.join(inactive)}",
            hint="run it where user namespaces and Landlock are allowed, or without --require-sandbox",
            value="--require-sandbox",
        )


def _check_header(file: Path, names: list[str]) -> None:
    """The strict reading that pulls and workers use, by this process and not by the one that wrote it."""
    size_bytes = file.stat().st_size
    try:
        with file.open("rb") as opened:
            first = opened.read(8)
            data = first + opened.read(header_length(first, size_bytes, path=str(file)))
        header = parse_header(data, size_bytes, path=str(file))
    except CacheError as error:
        found = str(error)
    else:
        found = "" if set(header.tensors) == set(names) else "other tensors"
    if found:
        raise IntegrityError(
            f"{file} is not what it should be: {found}", hint="convert it again", path=file, check="header",
            expected=f"{len(names)} tensors", found=found,
        )  # fmt: skip


def _show(made: Converted, folder: Path, output: str) -> None:
    tensors = sum(len(names) for names in made.files.values())
    if output == "json":
        print_json({
            "folder": str(made.folder), "files": sorted(made.files), "tensors": tensors,
            "tensor_bytes": made.tensor_bytes,
            "copied": made.copied, "left_out": made.left_out, "notes": made.notes,
            "sandbox": [asdict(item) for item in made.sandbox],
        })  # fmt: skip
        return
    for note in made.notes:
        say(f"note: {clean(note)}")
    if made.left_out:
        say(f"left out: {clean(', '.join(made.left_out))}")
    files = "file" if len(made.files) == 1 else "files"
    say(
        f"{tensors} tensors, {format_size(made.tensor_bytes)}, compared, in {len(made.files)} {files}; "
        f"{len(made.copied)} other files copied to {folder}"
    )
