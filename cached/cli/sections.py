"""The commands as `cached --help` shows them: by what one wants to do."""

from __future__ import annotations

from typing import Final

import click

SECTIONS: Final = {
    "Models": ("pull", "ls", "show", "path", "run", "ps", "verify"),
    "What stays where": ("tier", "pin", "unpin", "evict", "rm", "simulate"),
    "Publish and prepare": ("push", "catalog", "convert", "artifact"),
    "The daemon": ("serve", "install-service", "uninstall-service", "config", "health", "stats", "top", "events"),
    "This host": ("doctor", "bench", "coldstart", "version"),
}
"""Title → names, in the order in which they are shown. A test sees to it that every command is in one."""

_INDENT = 6


class Sections(click.Group):
    """A group that lists its commands in sections; what is in none comes last."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Group."""
        sections = {title: [name for name in names if name in self.commands] for title, names in SECTIONS.items()}
        shown = {name for names in sections.values() for name in names}
        sections["More"] = [name for name in self.list_commands(ctx) if name not in shown]
        longest = max(map(len, self.commands), default=0)
        for title, names in sections.items():
            if names:
                with formatter.section(title):
                    formatter.write_dl(self._rows(names, formatter.width - _INDENT - longest, longest))

    def _rows(self, names: list[str], limit: int, longest: int) -> list[tuple[str, str]]:
        """Of all sections the same columns."""
        return [(name.ljust(longest), self.commands[name].get_short_help_str(limit)) for name in names]
