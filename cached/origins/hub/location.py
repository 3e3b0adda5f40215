"""The URI of a hub origin, the versions of its files, and its options, parsed once. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from cached.errors import InvalidRequestError
from cached.origins.base import OriginSpec
from cached.origins.net.options import NET_OPTIONS
from cached.refs import check_path

HUB_OPTIONS = ("endpoint", "token_file", *NET_OPTIONS)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SPECIAL_REVISION = re.compile(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?", re.DOTALL)
_OTHER_KINDS = {"datasets", "spaces"}


@dataclass(frozen=True, slots=True)
class HubLocation:
    """``repository`` is ``ORG/REPO``; ``folder`` the path below it, or empty. ``only_folder``: it cannot be a file."""

    repository: str
    revision: str
    folder: str
    only_folder: bool

    @property
    def last_part(self) -> str:
        """The file's path, if the URI names one file."""
        return self.folder.rpartition("/")[2]

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision))


def parse_location(uri: str) -> HubLocation:
    """Raises InvalidRequestError, saying what would be right."""
    scheme, _, rest = uri.partition("://")
    organisation, _, rest = rest.partition("/")
    repository, revision, below = _split(rest)
    if organisation in _OTHER_KINDS:
        raise _wrong(uri, f"names one of the hub's {organisation}, which are no models")
    parts = _PART.fullmatch(organisation), _PART.fullmatch(repository)
    if scheme.lower() != "hf" or not all(parts) or not revision or "?" in uri or "#" in below:
        raise _wrong(uri, "does not name a model of a hub")
    folder = unquote(below.strip("/"))
    if folder:
        check_path(folder)
    return HubLocation(f"{organisation}/{repository}", unquote(revision), folder, not folder or below.endswith("/"))


def _split(rest: str) -> tuple[str, str, str]:
    """Repository, revision and what is below, of ``REPO[@REVISION][/PATH]``."""
    head, slash, below = rest.partition("/")
    if "@" not in head:
        return head, "main", below
    repository, _, revision = rest.partition("@")
    if special := _SPECIAL_REVISION.fullmatch(revision):
        return repository, special[1], special[2] or ""
    revision, slash, below = revision.partition("/")
    return repository, revision, below if slash else ""


def _wrong(uri: str, why: str) -> InvalidRequestError:
    shown = re.sub(r"://[^/@]*@", "://", uri).partition("?")[0][:200]
    return InvalidRequestError(
        f"{shown!r} {why}",
        hint="write hf://ORG/REPO, hf://ORG/REPO@REVISION or hf://ORG/REPO@REVISION/PATH; a token comes from HF_TOKEN "
        "or a token_file, never from the URI",
        value=shown,
    )


def version_of(commit: str, oid: str) -> str:
    """The version marker of a file: the commit that it is read from, and the name that git or LFS has for it."""
    return f"{commit}:{oid}"


def parse_version(version: str) -> tuple[str, str]:
    """Commit and oid; both empty if it is no marker of ours."""
    commit, _, oid = version.partition(":")
    return (commit, oid) if _COMMIT.fullmatch(commit) else ("", "")


def pinned(spec: OriginSpec, version: str) -> OriginSpec:
    """The same place at the commit of a file that was listed there, so that nothing is read from another one."""
    location = parse_location(spec.uri)
    commit, _ = parse_version(version)
    if not commit or location.is_pinned:
        return spec
    below = f"/{quote(location.folder)}" if location.folder else ""
    slash = "/" if below and location.only_folder else ""
    return OriginSpec(f"hf://{location.repository}@{commit}{below}{slash}", spec.options)
