"""Names, references and paths: parsed once, at the edge, and safe from then on. Standard library only."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from cached.errors import InvalidRequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REVISION = re.compile(r"[0-9a-f]{4,64}")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_BETWEEN_URIS = re.compile(r"\s+(?=[a-z][a-z0-9+.-]*://)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NEVER_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_ARTIFACT = re.compile(r"artifact\.([0-9a-f]{64})")
_MAX_PATH_BYTES = 1024
_MAX_PATH_PARTS = 32


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed REF. ``revision`` (a hex prefix) and ``uri`` may be empty; ``name`` never is."""

    name: str
    revision: str = ""
    uri: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def parse_ref(text: str) -> Ref:
    """``NAME``, ``NAME@REVISION`` or a URI, whose name is derived. Raises InvalidRequestError."""
    if _URI.match(text):
        return Ref(name=name_of_uri(text), uri=text)
    name, at, revision = text.partition("@")
    check_name(name)
    if at and not _REVISION.fullmatch(revision):
        raise InvalidRequestError(
            f"{revision!r} is not a revision",
            hint="a revision is 4 to 64 hexadecimal digits, as `cached ls` shows them",
            value=text[:200],
        )
    return Ref(name=name, revision=revision)


def uris_of(source: str) -> tuple[str, ...]:
    """The URIs of a source: one, or those of a chain, with blanks between them. The last one is its authority."""
    return tuple(_BETWEEN_URIS.split(source.strip()))


def check_source(ref: Ref, source: str) -> None:
    """Raises InvalidRequestError where a reference that is a URI and its source name different origins.

    A chain whose authority is that URI does not.
    """
    if ref.uri and source and ref.uri != uris_of(source)[-1]:
        raise InvalidRequestError(
            f"two sources are given: {ref.uri} and {source}",
            hint="give the URI alone, or a name and the source",
            value=source,
        )


def check_name(name: str) -> str:
    """A model name, unchanged, or InvalidRequestError. A valid name is also a safe file name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:200]!r} is not a model name",
            hint="use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit",
            value=name[:200],
        )
    return name


def name_of_uri(uri: str) -> str:
    """The name a model gets when only its URI is given: the last part of the path, or the host."""
    rest = uri.split("://", 1)[1].split("?", 1)[0].rstrip("/")
    last = rest.rsplit("/", 1)[-1]
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:128]
    if not cleaned:
        raise InvalidRequestError(
            f"no model name can be derived from {uri!r}",
            hint="give the name and the source: cached pull NAME --source URI",
            value=uri[:200],
        )
    return check_name(cleaned)


def artifact_name(key_digest: str) -> str:
    """What the compile artifact of a key is called: nothing else may have such a name."""
    return f"artifact.{check_digest(key_digest)}"


def artifact_digest(name: str) -> str:
    """The SHA-256 of the key whose compile artifact has this name; empty for any other name."""
    match = _ARTIFACT.fullmatch(name)
    return match[1] if match else ""


def check_digest(digest: str) -> str:
    """A lower-case hex SHA-256, unchanged, or InvalidRequestError."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequestError(
            f"{digest[:80]!r} is not a SHA-256", hint="write 64 lower-case hexadecimal digits", value=digest[:80]
        )
    return digest


def check_path(path: str) -> str:
    """A file's path within a model, unchanged, or InvalidRequestError.

    Relative, forward slashes, no empty, '.' or '..' part, no NUL, control character or backslash, normalised Unicode,
    bounded length and depth: so it can be joined to a folder without leaving it.
    """
    parts = path.split("/")
    bad = (
        not path
        or len(path.encode("utf-8", "surrogatepass")) > _MAX_PATH_BYTES
        or len(parts) > _MAX_PATH_PARTS
        or any(part in {"", ".", ".."} or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        or _NEVER_IN_PATHS.search(path)
        or unicodedata.normalize("NFC", path) != path
    )
    if bad:
        raise InvalidRequestError(
            f"{path[:200]!r} is not a path within a model",
            hint="paths are relative, with '/' between parts, without '.', '..', empty parts or control characters",
            value=path[:200],
        )
    return path
