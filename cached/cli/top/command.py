"""The command: asks, shows, listens for keys, and goes on when the daemon is back."""

from __future__ import annotations

import socket
import sys
import time
from dataclasses import replace
from datetime import datetime

import click
from rich.console import Console
from rich.live import Live

from cached.cli.connect import Globals, connected, pass_globals
from cached.cli.output import output_option, print_json, to_data
from cached.cli.top.keys import Keys
from cached.cli.top.screen import SORTS, VIEWS, Choice, Screen
from cached.overview import Overview
from cached.rpc.overview import overview_of
from cached.units import parse_duration
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import Connection
from cached_client.errors import CacheError

_LEAST_S = 0.2
_ANSWER_S = 10.0
_LOOK_S = 0.2
"""How soon a terminal of another size is noticed."""
_UNBOUNDED_COLUMNS = 240


def _interval(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if seconds < _LEAST_S:
        raise click.BadParameter(f"{value} is too often; {_LEAST_S:g} s is the least")
    return seconds


@click.command()
@click.option(
    "--interval", default="2s", show_default=True, callback=_interval, metavar="DURATION", help="Ask again this often."
)
@click.option("--once", is_flag=True, help="Show it once and end, as without a terminal.")
@output_option
@pass_globals
def top(options: Globals, interval: float, once: bool, output: str) -> None:
    """Show what is where, what moves, and who holds what, and go on until q is pressed.

    A cell of a level's bar is P for pinned models, H hot, W warm, A auto, C cold, T transient, / parts of models, x
    evicted but still mapped, = the pool, + reserved for what is arriving, and . for free.

    Keys: q ends it; m, l and e choose models, leases or events where not all of them fit; s sorts the models. When the
    daemon goes, it says so and goes on once the daemon is back. Without a terminal, or with --once, it prints once and
    ends; as JSON too.

    \b
    Examples:
      cached top
      cached top --interval 500ms
      cached top --once
      cached top -o json
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        answer = _ask(cache)
    if output == "json":
        print_json(to_data(answer))
        return
    overview = overview_of(answer)
    if once or not sys.stdout.isatty():
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_UNBOUNDED_COLUMNS)
        _print_once(Screen(overview, socket.gethostname()), console)
        return
    try:
        _Live(options, overview, interval).run()
    except KeyboardInterrupt:
        return  # as q


def _ask(cache: Connection) -> pb.OverviewResponse:
    return cache.call(cache.stub.Overview, pb.OverviewRequest(), timeout_s=_ANSWER_S)


def _print_once(screen: Screen, console: Console) -> None:
    with console.capture() as captured:
        console.print(screen)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


class _Live:
    """The screen as time goes on."""

    def __init__(self, options: Globals, overview: Overview, interval_s: float) -> None:
        self._options = options
        self._overview = overview
        self._interval_s = interval_s
        self._choice = Choice()
        self._lost = ""
        self._lost_time = ""
        self._console = Console(highlight=False)

    def run(self) -> None:
        """Until q."""
        with (
            Keys() as keys,
            connected(self._options) as cache,
            Live(console=self._console, screen=True, auto_refresh=False) as live,
        ):
            self._show(live)
            while self._waited(keys, live):
                self._look(cache)
                self._show(live)

    def _show(self, live: Live) -> None:
        screen = Screen(
            self._overview, socket.gethostname(), self._choice, self._lost, height=self._console.size.height
        )
        live.update(screen, refresh=True)

    def _waited(self, keys: Keys, live: Live) -> bool:
        """Until it is time to ask again; False to end."""
        until_s, size = time.monotonic() + self._interval_s, self._console.size
        while (left_s := until_s - time.monotonic()) > 0:
            key = keys.wait(min(left_s, _LOOK_S))
            if key == "q":
                return False
            if self._choose(key) or size != self._console.size:
                size = self._console.size
                self._show(live)
        return True

    def _choose(self, key: str) -> bool:
        """True if the key changed what is shown."""
        view = next((view for view in VIEWS if key and view.startswith(key)), "")
        if view:
            self._choice = replace(self._choice, view=view)
        elif key == "s":
            names = [*SORTS]
            self._choice = replace(self._choice, sort=names[(names.index(self._choice.sort) + 1) % len(names)])
        return bool(view) or key == "s"

    def _look(self, cache: Connection) -> None:
        """What is shown stays while the daemon does not answer."""
        try:
            self._overview = overview_of(_ask(cache))
            self._lost = self._lost_time = ""
        except CacheError as error:
            self._lost_time = self._lost_time or f"{datetime.now().astimezone():%H:%M:%S}"
            self._lost = f"No answer since {self._lost_time}, asking again: {error.message}"
