"""`cached path`: where a model's files are, at once or once they are there."""

from __future__ import annotations

import time

import click

from cached.cli.connect import Globals, connected, pass_globals, ref_argument, timeout_option
from cached.cli.failures import NOT_FOUND
from cached.cli.output import enum_word, say
from cached.cli.progress import Meter, meter
from cached.errors import TimeoutExpiredError
from cached.refs import check_source, parse_ref
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import Connection
from cached_client.errors import CacheError, DaemonUnavailableError, NotFoundError, NotReadyError
from cached_client.errors import TimeoutExpiredError as NoAnswerError

_POLL_S = 0.2
_SOON_S = 1.0
"""A daemon that does not answer for so long is worth a word."""
_LONG_S = 100 * 365 * 24 * 3600.0
_UNDER_WAY = {"pulling", "ready"}


@click.command()
@ref_argument
@click.option("--wait", is_flag=True, help="Wait until the model is ready, whoever brings it; also for the daemon.")
@click.option("--pull", is_flag=True, help="Bring the model if it is not there, and wait for it.")
@click.option("--source", default="", metavar="URI", help="With --pull: origin of a model that is not in the catalog.")
@timeout_option
@pass_globals
def path(options: Globals, ref: str, wait: bool, pull: bool, source: str, timeout: float | None) -> int:
    """Print the directory of a model in the cache.

    For programs that want files. Exit code 3 if the model is not in the cache, or, with --wait, if nothing is known of
    it; 4 if it did not come in time. The directory holds links, and stays whole while the model is leased or pinned:
    see `cached run` and `cached pin`. Standard output has the directory and nothing else.

    \b
    Examples:
      llama-server -m "$(cached path qwen-gguf)"/model.gguf
      vllm serve "$(cached path llama-13b --pull --timeout 10m)"
    """  # noqa: D301 click reads the control character
    if source and not pull:
        raise click.UsageError("--source is for --pull")
    if timeout is not None and not (wait or pull):
        raise click.UsageError("--timeout is for --wait and --pull")
    check_source(parse_ref(ref), source)
    with connected(options) as cache:
        place = _waited(cache, ref, source, pull, timeout) if wait or pull else _describe(cache, ref, None).path
    if place:
        click.echo(place)
        return 0
    say(f"{ref} is not in the cache; bring it with: cached pull {ref}, or wait for it with --wait")
    return NOT_FOUND


def _describe(cache: Connection, ref: str, timeout_s: float | None) -> pb.DescribeResponse:
    return cache.call(cache.stub.Describe, pb.DescribeRequest(ref=ref), timeout_s=timeout_s)


def _waited(cache: Connection, ref: str, source: str, pull: bool, timeout: float | None) -> str:
    """The directory, once there is one. Raises TimeoutExpiredError, and why a pull of ours failed."""
    end_s = time.monotonic() + (_LONG_S if timeout is None else timeout)
    with meter() as bar:
        while True:
            try:
                return _watched(cache, ref, source, pull, None if timeout is None else end_s, bar)
            except (DaemonUnavailableError, NotReadyError) as error:  # it is not there yet, or it is restarted
                _wait_for_daemon(cache, end_s, error)


def _watched(cache: Connection, ref: str, source: str, pull: bool, end_s: float | None, bar: Meter) -> str:
    """As ``_waited``, with one daemon. Raises DaemonUnavailableError and NotReadyError, too."""
    if pull and not _is_there(cache, ref, _left_s(end_s)):
        ref = _pull(cache, ref, source, _left_s(end_s), bar)
    while True:
        detail = _describe(cache, ref, _left_s(end_s))
        if detail.path:
            return detail.path
        if end_s is not None and time.monotonic() > end_s:
            raise TimeoutExpiredError(f"{ref} was not ready in time", hint=_advice(ref, detail))
        summary = detail.summary
        done_bytes = round(summary.progress * summary.size_bytes)
        bar.update(f"{ref}: {enum_word(summary, 'state')}", done_bytes, summary.size_bytes)
        time.sleep(_POLL_S)


def _left_s(end_s: float | None) -> float | None:
    """For one call; not so little that a daemon which is there could not answer."""
    return None if end_s is None else max(_SOON_S, end_s - time.monotonic())


def _wait_for_daemon(cache: Connection, end_s: float, error: CacheError) -> None:
    """Until one answers. ``error``: how it was found missing."""
    say_s = time.monotonic() + _SOON_S
    while time.monotonic() < end_s:
        time.sleep(_POLL_S)
        if time.monotonic() > say_s:
            say(f"waiting for the daemon: {error.message}")
            say_s = end_s
        try:
            cache.wait_ready(min(_SOON_S, max(0.0, end_s - time.monotonic())))
        except (DaemonUnavailableError, NotReadyError, NoAnswerError) as later:
            error = later
        else:
            return
    raise TimeoutExpiredError(f"no daemon in time: {error.message}", hint=error.hint) from error


def _is_there(cache: Connection, ref: str, timeout_s: float | None) -> bool:
    """Whether it needs no pull. A model that nobody knows of needs one, too."""
    try:
        return bool(_describe(cache, ref, timeout_s).path)
    except NotFoundError:
        return False


def _pull(cache: Connection, ref: str, source: str, timeout_s: float | None, bar: Meter) -> str:
    """The model's reference from then on: a URI was given a name."""
    request = pb.PullRequest(ref=ref, source=source, level=pb.LEVEL_L1)
    for response in cache.stream(cache.stub.Pull, request, timeout_s=timeout_s):
        last = response.progress
        bar.update(f"{last.name or ref}: {enum_word(last, 'phase')}", last.done_bytes, last.total_bytes)
        ref = f"{last.name}@{last.revision}" if last.name and last.revision else ref
    return ref


def _advice(ref: str, detail: pb.DescribeResponse) -> str:
    if detail.last_error:
        return f"its last pull failed: {detail.last_error}"
    if enum_word(detail.summary, "state") in _UNDER_WAY:
        return "it is on its way: give it more time"
    return f"nobody brings it: use --pull, or cached pull {ref}"
