"""URLs as origins take them, and as the catalog checks them before there is an origin."""

from __future__ import annotations

import re
from urllib.parse import unquote, urljoin, urlsplit

from cached.errors import InvalidRequestError

_URL = re.compile(r"https?://[^/@?#\s]+(/[^@?#\s]*)?")


def check_url(name: str, url: str) -> str:
    """An http(s) URL without user, query and fragment, and without the slash at its end. Raises InvalidRequestError."""
    if not _URL.fullmatch(url) or not link_of(url, ""):
        raise InvalidRequestError(
            f"{name} is not a URL", hint="write http(s)://HOST:PORT, without user, password and query", value=name
        )
    return url.rstrip("/")


def link_of(url: str, target: str) -> str:
    """Where a link at a URL leads; empty for what cannot be a URL, such as a port beyond 65535."""
    try:
        found = urljoin(url, target)
        server_of(found)
    except ValueError:
        return ""
    return found


def server_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: who gets what is sent there."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or (443 if scheme == "https" else 80)


def without_query(url: str) -> str:
    """A URL that may be told: signed URLs have their signature in the query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def local_path(uri: str) -> str:
    """The path that a ``file://`` URI names. Raises InvalidRequestError."""
    if "?" in uri or "#" in uri:
        raise InvalidRequestError(
            f"{uri[:200]!r} has a query or a fragment, which folders have not",
            hint="write %3F for ? and %23 for # in the names of folders and files",
            value=uri[:200],
        )
    try:
        parts = urlsplit(uri)
    except ValueError:
        parts = urlsplit("")
    path = unquote(parts.path)
    local = parts.scheme == "file" and parts.netloc in {"", "localhost"}
    if not local or not path.startswith("/") or "\0" in path:
        raise InvalidRequestError(
            f"{uri[:200]!r} is not a URI of a local folder",
            hint="write file:// and an absolute path, such as file:///mnt/models/NAME",
            value=uri[:200],
        )
    return path
