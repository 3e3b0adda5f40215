"""The commands as `cached --help` shows them: by what one wants to do. Only what is run is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Final

import click

SECTIONS: Final = {
    "Models": {
        "pull": "pull:pull", "ls": "models:ls", "show": "models:show", "path": "path:path", "run": "run:run",
        "ps": "models:ps", "verify": "pull:verify",
    },
    "What stays where": {
        "tier": "models:tier", "pin": "models:pin", "unpin": "models:unpin", "evict": "models:evict", "rm": "models:rm",
        "simulate": "simulate:simulate_command",
    },
    "Publish and prepare": {
        "push": "push:push", "catalog": "catalog:catalog", "convert": "convert:convert_command",
        "artifact": "artifact:artifact",
    },
    "The daemon": {
        "serve": "serve:serve", "install-service": "service:install_service",
        "uninstall-service": "service:uninstall_service", "config": "ops:config", "health": "ops:health",
        "stats": "ops:stats", "top": "top:top", "events": "ops:events",
    },
    "This host": {
        "doctor": "doctor:doctor", "bench": "bench:bench", "coldstart": "coldstart:coldstart", "version": "ops:version",
    },
}  # fmt: skip
"""Title → name → where in this package it is, in the order in which they are shown."""

_INDENT = 6


class _Commands(Mapping[str, click.Command]):
    """Name → command, imported when it is first asked for: all of them take longer than most of them run."""

    def __init__(self) -> None:
        self._places = {name: place for names in SECTIONS.values() for name, place in names.items()}

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._places[name].partition(":")
        command: click.Command = getattr(import_module(f"cached.cli.{module}"), attribute)
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Sections(click.Group):
    """A group of all commands that lists them in sections."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands = _Commands()  # type: ignore[assignment]  # click only reads it

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Group."""
        longest = max(map(len, self.commands))
        limit = formatter.width - _INDENT - longest
        for title, names in SECTIONS.items():
            with formatter.section(title):
                # Of all sections the same columns.
                formatter.write_dl(
                    [(name.ljust(longest), self.commands[name].get_short_help_str(limit)) for name in names]
                )
