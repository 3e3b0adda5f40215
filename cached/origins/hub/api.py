"""What a hub tells of a repository: which commit a revision is, and the files of a commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cached.errors import CachedError, NotFoundError, OriginDeniedError, OriginError
from cached.origins.net.failures import Failures
from cached.origins.net.session import Session
from cached.urls import link_of, server_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^>]*)>\s*;[^,]*\brel="?next"?')
_MAX_PAGES = 1000


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit. ``sha256`` is empty unless it is kept in LFS (or Xet).

    ``git_oid`` is git's name of what the repository has: the content, or for LFS a pointer to it.
    """

    path: str
    size_bytes: int
    git_oid: str
    sha256: str

    @property
    def oid(self) -> str:
        """What the hub calls it, also in the ETag of its content."""
        return self.sha256 or self.git_oid


class HubApi:
    """Of one repository. Each call is a request."""

    def __init__(self, session: Session, failures: Failures, endpoint: str, repository: str) -> None:
        self._session = session
        self._failures = failures
        self._endpoint = endpoint
        self._repository = repository

    def commit(self, revision: str) -> str:
        """The commit that a branch, tag or other revision is now. Raises NotFoundError."""
        url = f"{self._endpoint}/api/models/{self._repository}/revision/{quote(revision, safe='')}"
        _, told = self._session.json(url, "")
        commit = told.get("sha") if isinstance(told, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._strange("it tells no commit of the revision")
        return commit

    def files(self, commit: str) -> dict[str, HubFile]:
        """All files of a commit, by path; page after page."""
        url = f"{self._endpoint}/api/models/{self._repository}/tree/{commit}?recursive=true"
        found: dict[str, HubFile] = {}
        for _ in range(_MAX_PAGES):
            answer, page = self._session.json(url, "")
            if not isinstance(page, list):
                raise self._strange("its list of files is not a list")
            for entry in page:
                if isinstance(entry, dict) and entry.get("type") == "file":
                    file = self._file(entry)
                    found[file.path] = file
            following = _NEXT.search(answer.headers.get("Link", ""))
            if following is None:
                return found
            url = link_of(url, following[1])
            if not url:
                raise self._strange("its list of files goes on at what is no URL")
            if server_of(url) != server_of(self._endpoint):
                raise self._strange("its list of files goes on at another server")
        raise self._strange("its list of files does not end")

    def content_url(self, commit: str, path: str) -> str:
        """Where the content of a file is; it may redirect."""
        return f"{self._endpoint}/{self._repository}/resolve/{commit}/{quote(path)}"

    def _file(self, entry: Mapping[str, Any]) -> HubFile:
        lfs = entry.get("lfs") or {}
        if not isinstance(lfs, dict):
            raise self._strange(f"what it tells of {str(entry.get('path'))[:200]!r} is not what a hub tells")
        path, git_oid = entry.get("path"), entry.get("oid")
        sha256, size = lfs.get("oid", ""), lfs.get("size", entry.get("size"))
        sha256 = str(sha256).removeprefix("sha256:")
        right = (
            isinstance(path, str) and isinstance(git_oid, str) and _SHA1.fullmatch(git_oid)
            and type(size) is int and size >= 0 and (not sha256 or _SHA256.fullmatch(sha256))
        )  # fmt: skip
        if not right:
            raise self._strange(f"what it tells of {str(path)[:200]!r} is not what a hub tells")
        return HubFile(str(path), int(size or 0), str(git_oid), sha256)

    def _strange(self, what: str) -> OriginError:
        return self._failures.make(
            OriginError, what, "", cause="protocol", hint="look whether the endpoint is a Hugging Face-compatible hub"
        )


class HubFailures(Failures):
    """What a hub says with a status: its header X-Error-Code tells more than that."""

    def __init__(self, uri: str, endpoint: str, repository: str, token: str, token_from: str) -> None:
        if token:
            access = (
                f"a token was shown (from {token_from}): accept the model's terms at {endpoint}/{repository} with its "
            )
            access += "account, and let the token read gated repositories"
        else:
            access = f"no token was shown ({token_from}): if it is gated, first accept the terms at {endpoint}/"
            access += f"{repository}; if it is neither gated nor private, it is not there"
        super().__init__(
            uri, endpoint, secrets=(token,), denied_hint=access,
            missing_hint=f"look at {endpoint}/{repository}: the path, and the branch, tag or commit after '@'",
        )  # fmt: skip
        self._repository = repository
        self._has_token = bool(token)

    def answered(
        self, status: int, headers: Mapping[str, str], text: str, path: str, *, expected_version: str = ""
    ) -> CachedError:
        """See Failures."""
        code = headers.get("X-Error-Code", "")
        if code == "GatedRepo":
            return self.make(
                OriginDeniedError, f"access to {self._repository} is gated", path, hint=self._denied_hint, cause=code
            )
        # A hub does not say whether a repository that one may not see is there: 401 without a token, 404 with one.
        if code == "RepoNotFound" and (status == 401 or not self._has_token):
            return self.make(
                OriginDeniedError, f"there is no {self._repository}, or it is private", path, hint=self._denied_hint,
                cause=code,
            )  # fmt: skip
        if code == "RepoNotFound":
            return self._not_there(f"there is no model {self._repository}, or the token may not see it", path)
        if code == "RevisionNotFound":
            error = self._not_there(f"{self._repository} has no such revision", path)
            error.fields["cause"] = code
            return error
        return super().answered(status, headers, text, path, expected_version=expected_version)

    def _not_there(self, what: str, path: str) -> NotFoundError:
        return NotFoundError(
            f"{self._where(path)}: {what} (at {self._server})", hint=self._missing_hint, uri=self._uri, path=path
        )
