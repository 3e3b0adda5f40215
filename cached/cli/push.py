"""`cached push`: uploads a directory to an origin, and says what to write into the catalog. Needs no daemon."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cached.cli.output import clean, output_option, print_json, rate, say
from cached.cli.progress import meter
from cached.config import flag_name, load_config, origin_defaults, process_environment
from cached.convert.checkpoint import files_below
from cached.errors import IntegrityError, InvalidRequestError, NotFoundError
from cached.origins.base import OriginObject, OriginSpec, WritableOrigin
from cached.origins.registry import check_scheme, open_writable
from cached.origins.selection import select
from cached.refs import check_name, name_of_uri
from cached.units import MIB, format_duration, format_size

_PARALLEL = 4
_READ_BYTES = 4 * MIB
_POLL_S = 0.1
_TIDY_S = 10.0
_ORIGIN_FLAGS = ("endpoint_url", "region", "profile", "anonymous", "addressing", "ca_bundle")


@dataclass(frozen=True, slots=True)
class _Local:
    path: str
    file: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Sent:
    """A file that the origin has."""

    item: OriginObject
    sha256: str


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("uri")
@click.option("--name", help="Name for the catalog snippet.  [the last part of the URI]")
@click.option("--endpoint-url", metavar="URL", help="S3 endpoint other than AWS's.")
@click.option("--region", help="S3 region.")
@click.option("--profile", help="Profile of the AWS configuration files.")
@click.option("--anonymous", is_flag=True, default=None, help="Send unsigned requests.")
@click.option("--addressing", type=click.Choice(["auto", "path", "virtual"]), help="S3 bucket in path or host name.")
@click.option("--ca-bundle", metavar="FILE", help="Certificate authorities to trust.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Configuration file, for its [s3] section.")
@output_option
def push(folder: Path, uri: str, name: str | None, file: Path | None, output: str, **flags: Any) -> None:
    """Upload a model's directory to an origin.

    Then prints its catalog entry, with checksums. Hidden files are left out. Links to files are followed; a link that
    leads nowhere, or to a folder, is refused. Settings of S3 come from the [s3] section, CACHED_S3_* variables and
    these flags, which are refused for other origins; credentials from the usual AWS places.

    \b
    Example:
      cached push ./tiny-llama s3://bucket/models/tiny-llama --endpoint-url http://127.0.0.1:9000
    """  # noqa: D301 click reads the control character
    check_scheme(uri)
    name = check_name(name) if name else name_of_uri(uri)
    scheme = uri.partition("://")[0].lower()
    given = {f"s3.{key}": _flag_text(flags[key]) for key in _ORIGIN_FLAGS if flags[key] is not None}
    if given and scheme != "s3":
        raise InvalidRequestError(
            f"{', '.join(map(_flag_of, given))}: of s3:// alone, and {scheme}:// was given",
            hint="remove what is not for this origin",
            value=_flag_of(next(iter(given))),
        )
    loaded = load_config(file, process_environment(), given, flag_of=_flag_of)
    options = origin_defaults(loaded.config).get(scheme, {})
    files = _locals(folder)
    # What no pull would take is not uploaded.
    select([OriginObject(item.path, item.size_bytes, "") for item in files], source=folder.resolve().as_uri())
    origin = open_writable(OriginSpec(uri, options))
    began_s = time.monotonic()
    try:
        sent = _send_all(origin, files, quiet=output == "json")
    finally:
        origin.close()
    seconds = time.monotonic() - began_s
    entry = _catalog_entry(uri, sent, {key: options[key] for key in _ORIGIN_FLAGS if key in options})
    total_bytes = sum(item.size_bytes for item in files)
    if output == "json":
        catalog = {"models": {name: entry}}
        print_json({"files": len(files), "size_bytes": total_bytes, "seconds": seconds, "catalog": catalog})
        return
    speed = rate(total_bytes, seconds)
    took = f"{format_duration(seconds)}" + (f" ({speed})" if speed else "")
    say(f"{len(files)} files, {format_size(total_bytes)} in {took} to {uri}")
    say("For the catalog:")
    click.echo(json.dumps({"models": {name: entry}}, indent=2, ensure_ascii=False))


def _flag_of(key: str) -> str:
    """What this command calls a setting: it has flags for those of S3 alone, without the section's name."""
    return flag_name(key.removeprefix("s3."))


def _flag_text(value: object) -> str:
    return "true" if value is True else str(value)


def _locals(folder: Path) -> list[_Local]:
    """What is to be uploaded, sorted."""
    found = [_Local(file.relative_to(folder).as_posix(), file, file.stat().st_size) for file in files_below(folder)]
    if not found:
        raise NotFoundError(f"there are no files in {folder}", hint="give the directory that holds the model's files")
    return sorted(found, key=lambda item: item.path)


class _Counter:
    """Bytes that were sent, counted from several threads; each of them ends at the next ones once it is ``stopped``."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._sent_bytes = 0

    def add(self, count: int) -> None:
        """Also the origins' progress callback: what it raises ends an upload."""
        self.check()
        with self._lock:
            self._sent_bytes += count

    def check(self) -> None:
        if self.stopped.is_set():
            raise InvalidRequestError("the upload was stopped")

    @property
    def sent_bytes(self) -> int:
        return self._sent_bytes


def _send_all(origin: WritableOrigin, files: Sequence[_Local], *, quiet: bool) -> list[_Sent]:
    """Uploads all, a few at a time. The first failure, or an interruption, ends it; nothing partial is left."""
    counter = _Counter()
    total_bytes = sum(item.size_bytes for item in files)
    pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="cached-push")
    with meter(quiet=quiet) as bar:
        futures = [pool.submit(_send, origin, item, counter) for item in files]
        try:
            _watch(futures, lambda: bar.update("uploading", min(counter.sent_bytes, total_bytes), total_bytes))
        finally:
            counter.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _wait_until_ended([future for future in futures if not future.cancelled()])
    return [future.result() for future in futures]


def _watch(futures: Sequence[Future[_Sent]], show: Callable[[], None]) -> None:
    pending = set(futures)
    while pending:
        show()
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
    show()


def _wait_until_ended(futures: Sequence[Future[_Sent]]) -> None:
    """What was stopped removes what it has sent in part: an interrupt, which is repeated, does not cut that short."""
    end_s = time.monotonic() + _TIDY_S
    while time.monotonic() < end_s:
        try:
            if not wait(futures, timeout=_POLL_S).not_done:
                return
        except KeyboardInterrupt:
            continue


def _send(origin: WritableOrigin, local: _Local, counter: _Counter) -> _Sent:
    before = local.file.stat()
    digest = hashlib.sha256()
    with local.file.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            counter.check()
    item = origin.upload_file(local.file, local.path, counter.add)
    after = local.file.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise IntegrityError(
            f"{local.path} was changed while it was uploaded",
            hint="push again when nothing writes to the directory any more",
            path=local.path,
        )
    return _Sent(item, digest.hexdigest())


def _catalog_entry(uri: str, sent: Sequence[_Sent], options: Mapping[str, str]) -> dict[str, Any]:
    """What the catalog may say of the model: only files that a pull selects, so that it can be pasted as it is."""
    digests = {item.item.path: item.sha256 for item in sent}
    chosen = select([item.item for item in sent])
    for note in chosen.notes:
        say(f"note: a pull will have {clean(note)}" if note.startswith("left out") else f"note: {note}")
    entry: dict[str, Any] = {"source": uri, "tier": "warm", "size": sum(item.size_bytes for item in chosen.files)}
    entry["sha256"] = {path: digests[path] for path in sorted(item.path for item in chosen.files)}
    if options:
        entry["origin"] = {key: value == "true" if key == "anonymous" else value for key, value in options.items()}
    return entry
