"""The status page: one look at the daemon, made in the loop, put into HTML beside it, and shared by all who look."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cached.overview import Limits, Overview
from cached.overview.words import clean
from cached.web.view import View, view_of

if TYPE_CHECKING:
    from jinja2 import Template

FRESH_S = 0.5
"""A page that is younger is shown again, so that many who look cost no more than one."""
_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Page:
    """The document, also packed as most browsers take it."""

    html: bytes
    packed: bytes


class Renderer:
    """A view as HTML. Everything that is put into it is escaped: the template language does it, not the template."""

    def __init__(self) -> None:
        assets = files("cached.web") / "assets"
        self._style = _dense((assets / "status.css").read_text(encoding="utf-8"))
        self._script = _dense((assets / "status.js").read_text(encoding="utf-8"))
        self._source = (assets / "status.html.j2").read_text(encoding="utf-8")

    @cached_property
    def policy(self) -> str:
        """The Content-Security-Policy: this style and this script, requests to this server, and nothing else."""
        return "; ".join(
            (
                "default-src 'none'",
                f"script-src '{_digest(self._script)}'",
                f"style-src '{_digest(self._style)}'",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        )

    def html(self, view: View) -> str:
        """Any thread."""
        return self._template.render(view=view)

    @cached_property
    def _template(self) -> Template:
        # Not before somebody looks: a daemon whose page nobody opens does without the library.
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
        )
        made = {"style": Markup(self._style), "script": Markup(self._script)}  # noqa: S704 - files of ours
        made_of = hashlib.sha256((self._style + self._script + self._source).encode()).hexdigest()
        return environment.from_string(self._source, globals={**made, "made_of": made_of[:16]})


def _dense(text: str) -> str:
    """Without indentation: the page is fetched every other second."""
    return "\n".join(line.strip() for line in text.splitlines())


def _printable(value: Any) -> Any:
    """Text from elsewhere without what would turn the direction of writing, or is no character at all."""
    return clean(value) if type(value) is str else value  # Markup is text of ours


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


class StatusPage:
    """Loop only. ``overview`` is called at most every FRESH_S, in the loop; it gives None while there is none yet."""

    def __init__(
        self,
        overview: Callable[[Limits], Overview | None],
        not_ready: Callable[[], tuple[str, ...]],
        *,
        host: str,
        wall_s: Callable[[], float],
    ) -> None:
        self._overview = overview
        self._not_ready = not_ready
        self._host = host
        self._wall_s = wall_s
        self._renderer = Renderer()
        self._making = asyncio.Lock()
        self._made: Page | None = None
        self._made_s = float("-inf")

    @property
    def policy(self) -> str:
        """The header Content-Security-Policy."""
        return self._renderer.policy

    async def get(self) -> Page:
        """The page as it is now, or was a moment ago."""
        async with self._making:  # who comes meanwhile gets the same
            loop = asyncio.get_running_loop()
            if self._made is None or loop.time() - self._made_s >= FRESH_S:
                overview, reasons = self._overview(_LIMITS), self._not_ready()
                self._made = await asyncio.to_thread(self._render, overview, reasons, self._wall_s())
                self._made_s = loop.time()
            return self._made

    def _render(self, overview: Overview | None, reasons: tuple[str, ...], now_s: float) -> Page:
        html = self._renderer.html(view_of(overview, reasons, host=self._host, now_s=now_s)).encode("utf-8", "replace")
        return Page(html, gzip.compress(html, 3))
