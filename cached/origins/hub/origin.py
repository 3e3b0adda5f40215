"""HubOrigin: the files of a repository at one commit, and ranges of them from the servers that the hub redirects to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cached.config import hub_endpoint, hub_token, process_environment
from cached.errors import CachedError, InvalidRequestError, NotFoundError, OriginError
from cached.origins.base import Abort, OriginChecksum, OriginObject, OriginSpec, ReadInto
from cached.origins.hub.api import HubApi, HubFailures, HubFile
from cached.origins.hub.location import HUB_OPTIONS, parse_location, parse_version, version_of
from cached.origins.net.body import Body, range_problem
from cached.origins.net.options import bearer, check_known, net_options
from cached.origins.net.reading import range_read, read_nothing
from cached.origins.net.session import Answer, Hop, Session
from cached.refs import check_path
from cached.urls import check_url, server_of

_LOCATION_S = 600.0
"""Signed URLs live an hour as a rule."""
_MAX_TREES = 4


class HubOrigin:
    """See Origin. One may be used by any number of threads.

    Options: ``endpoint``, ``token_file`` and those of NetOptions. The token is found by ``config.hub_token``.
    """

    def __init__(self, spec: OriginSpec) -> None:
        self._location = parse_location(spec.uri)
        check_known("hf", spec.options, HUB_OPTIONS)
        env = process_environment()
        self._endpoint = check_url("endpoint", spec.options.get("endpoint") or hub_endpoint(env))
        token_file = spec.options.get("token_file", "")
        token = hub_token(self._endpoint, token_file, env)
        self._failures = HubFailures(
            spec.uri, self._endpoint, self._location.repository, token,
            _token_source(token, token_file, is_default=self._endpoint == hub_endpoint(env)),
        )  # fmt: skip
        self._session = Session(
            net_options(spec.options), self._failures, home=self._endpoint,
            authorization=lambda: bearer(token),
        )  # fmt: skip
        self._api = HubApi(self._session, self._failures, self._endpoint, self._location.repository)
        self._lock = threading.Lock()
        self._trees: dict[str, Mapping[str, HubFile]] = {}
        self._moved: dict[tuple[str, str], tuple[str, float]] = {}

    def prepare(self) -> None:
        """See Origin. There is nothing to do."""

    def list_objects(self) -> list[OriginObject]:
        """See Origin. Of the commit that the revision is now."""
        commit = self._commit()
        found = {path: file for full, file in self._files(commit).items() if (path := self._below(full))}
        if not found:
            raise self._failures.missing("")
        return [_described(path, commit, file, checked=False) for path, file in sorted(found.items())]

    def stat(self, path: str) -> OriginObject:
        """See Origin. What is in LFS has the SHA-256 of its content, any other file git's SHA-1."""
        check_path(path)
        commit = self._commit()
        file = self._files(commit).get(self._full(path, commit))
        if file is None:
            raise self._failures.missing(path)
        return _described(path, commit, file, checked=True)

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. At the item's commit, whatever the revision is now; a range without bytes costs a HEAD."""
        check_path(item.path)
        commit, _ = parse_version(item.version)
        if not commit:
            raise self._failures.changed(item.path, item.version, "a version of another kind")
        full = self._full(item.path, commit)
        if not length_bytes:
            self._check_version(item, commit, full)
            yield read_nothing
            return
        asked = f"bytes={offset_bytes}-{offset_bytes + length_bytes - 1}"

        def begin(body: Body) -> None:
            answer = self._ask(item, commit, full, asked)
            body.begin(answer.raw)
            headers = answer.headers
            fields = {"ContentRange": headers.get("Content-Range"), "ContentLength": headers.get("Content-Length")}
            problem = range_problem(fields, offset_bytes, length_bytes, item.size_bytes)
            if problem:
                raise self._failures.wrong_range(item.path, asked, problem)

        with range_read(begin, self._failures, item.path, asked, length_bytes, abort) as read_into:
            yield read_into

    def close(self) -> None:
        """See Origin. A later call connects anew."""
        self._session.close()

    def _commit(self) -> str:
        if self._location.is_pinned:
            return self._location.revision
        return self._api.commit(self._location.revision)

    def _files(self, commit: str) -> Mapping[str, HubFile]:
        """All files of the repository at a commit; asked once, since it never changes."""
        with self._lock:
            known = self._trees.get(commit)
        if known is None:
            known = self._api.files(commit)
            with self._lock:
                while len(self._trees) >= _MAX_TREES:
                    del self._trees[next(iter(self._trees))]
                self._trees[commit] = known
        return known

    def _below(self, full: str) -> str:
        """The path that a file of the repository has here; empty if it is not below the URI."""
        folder = self._location.folder
        if full == folder and not self._location.only_folder:
            return self._checked(self._location.last_part)
        if folder and not full.startswith(f"{folder}/"):
            return ""
        return self._checked(full[len(folder) + 1 :] if folder else full)

    def _full(self, path: str, commit: str) -> str:
        folder = self._location.folder
        if path == self._location.last_part and not self._location.only_folder and folder in self._files(commit):
            return folder
        return f"{folder}/{path}" if folder else path

    def _checked(self, path: str) -> str:
        try:
            return check_path(path)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{path[:200]!r} in {self._location.repository} cannot be a file of a model: {error}",
                hint=f"rename or remove it there; {error.hint}",
                value=path[:200],
            ) from error

    def _ask(self, item: OriginObject, commit: str, full: str, asked: str) -> Answer:
        """The answer to a ranged GET, from where the hub redirected the last one to, if that is known."""
        known = self._known_location(commit, full)
        if known:
            try:
                return self._session.ask("GET", known, item.path, {"Range": asked})
            except OriginError as error:
                self._forget_location(commit, full)
                if error.retryable:
                    raise
            except NotFoundError:
                self._forget_location(commit, full)  # a signed URL that expired
        return self._ask_hub("GET", item, commit, full, {"Range": asked})

    def _ask_hub(self, method: str, item: OriginObject, commit: str, full: str, headers: Mapping[str, str]) -> Answer:
        def on_hop(hop: Hop) -> None:
            if self._is_hub(hop.url):
                self._check_headers(item, commit, hop.headers)

        url = self._api.content_url(commit, full)
        try:
            answer = self._session.ask(method, url, item.path, headers, on_hop=on_hop)
        except NotFoundError as error:
            raise self._gone(item, error) from None
        if self._is_hub(answer.url):
            try:
                self._check_headers(item, commit, answer.headers)
            except CachedError:
                answer.raw.close()
                raise
        elif method == "GET":
            with self._lock:
                self._moved[commit, full] = answer.url, time.monotonic() + _LOCATION_S
        return answer

    def _is_hub(self, url: str) -> bool:
        return server_of(url) == server_of(self._endpoint)

    def _check_headers(self, item: OriginObject, commit: str, headers: Mapping[str, str]) -> None:
        """The hub's own words on what it answers; those of the servers behind it mean nothing to us."""
        _, oid = parse_version(item.version)
        found_oid = (headers.get("X-Linked-Etag") or headers.get("ETag") or oid).removeprefix("W/").strip('"')
        found_commit = headers.get("X-Repo-Commit") or commit
        if (found_commit, found_oid) != (commit, oid):
            raise self._failures.changed(item.path, item.version, version_of(found_commit, found_oid))

    def _check_version(self, item: OriginObject, commit: str, full: str) -> None:
        self._ask_hub("HEAD", item, commit, full, {}).raw.drain_conn()

    def _gone(self, item: OriginObject, error: NotFoundError) -> CachedError:
        """A commit may be gone when history was rewritten: is the file still there, at another commit?"""
        if self._location.is_pinned:
            return error
        try:
            found = self.stat(item.path)
        except NotFoundError as missing:
            return missing
        return (
            error if found.version == item.version else self._failures.changed(item.path, item.version, found.version)
        )

    def _known_location(self, commit: str, full: str) -> str:
        with self._lock:
            url, until_s = self._moved.get((commit, full), ("", 0.0))
        return url if time.monotonic() < until_s else ""

    def _forget_location(self, commit: str, full: str) -> None:
        with self._lock:
            self._moved.pop((commit, full), None)


def _described(path: str, commit: str, file: HubFile, *, checked: bool) -> OriginObject:
    checksum = OriginChecksum("sha256", file.sha256) if file.sha256 else OriginChecksum("git-sha1", file.git_oid)
    return OriginObject(path, file.size_bytes, version_of(commit, file.oid), (checksum,) if checked else ())


def _token_source(token: str, token_file: str, *, is_default: bool) -> str:
    """Where the token is from, in words; never the token."""
    if token_file:
        return f"the file {token_file}"
    if token:
        return "HF_TOKEN or the token file of Hugging Face's tools"
    if is_default:
        return "there is no HF_TOKEN, no token file of Hugging Face's tools, and no token_file is set"
    return "HF_TOKEN is for HF_ENDPOINT only; name a token_file for this endpoint"
