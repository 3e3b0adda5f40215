"""HttpOrigin: files of a web server that somebody lists, or one file."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import quote, unquote, urlsplit

from cached.config import read_token
from cached.errors import InvalidRequestError, NotFoundError, OriginError
from cached.origins.base import Abort, OriginChecksum, OriginObject, OriginSpec, ReadInto
from cached.origins.http.listing import DEFAULT_LIST, condition, marker, parse_list, same_version
from cached.origins.net.body import Body, range_problem
from cached.origins.net.failures import Failures
from cached.origins.net.options import NET_OPTIONS, bearer, check_known, net_options, refuse
from cached.origins.net.reading import range_read, read_nothing
from cached.origins.net.session import Answer, Hop, Session
from cached.refs import check_path
from cached.urls import check_url, link_of, server_of, without_query

HTTP_OPTIONS = ("files", "list", "token_file", *NET_OPTIONS)
_THREADS = 8
_MAX_DIGITS = 19


class HttpOrigin:
    """See Origin. One may be used by any number of threads.

    Options: ``files`` (paths below the URI, a line each), ``list`` (URL of a list, relative to the URI), ``token_file``
    (sent as a bearer token to the URI's server alone), and those of NetOptions.
    """

    def __init__(self, spec: OriginSpec) -> None:
        check_known("https", spec.options, HTTP_OPTIONS)
        url = _checked_url(spec.uri)
        token_file = spec.options.get("token_file", "")
        token = read_token(token_file) if token_file else ""
        self._url = url.rstrip("/")
        self._only_folder = url.endswith("/") or bool(spec.options.get("files") or spec.options.get("list"))
        self._named = _named_files(spec.options.get("files", ""))
        self._list_url = self._checked_list(spec.options.get("list", ""))
        self._failures = Failures(
            spec.uri, "{}://{}:{}".format(*server_of(url)), secrets=(token,),
            denied_hint=f"the token of {token_file} was sent: look whether it is right and valid"
            if token else "no token was sent: name a file with one as token_file in the catalog",
            missing_hint=f"name one file; or a folder with a list of its files: {DEFAULT_LIST} in it, or `list` or "
            "`files` in the origin table of the catalog",
        )  # fmt: skip
        self._session = Session(
            net_options(spec.options), self._failures, home=url, authorization=lambda: bearer(token)
        )
        self._lock = threading.Lock()
        self._one_file: bool | None = False if self._only_folder else None
        self._listed: tuple[str, dict[str, str]] = ("", {})

    def prepare(self) -> None:
        """See Origin. There is nothing to do."""

    def list_objects(self) -> list[OriginObject]:
        """See Origin. Costs a HEAD for each file."""
        if self._is_one_file():
            return [self._described(self._last_part, {}, checked=False)]
        sums = self._sums()
        paths = sorted(self._named or sums)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="head") as pool:
            return list(pool.map(lambda path: self._described(path, sums, checked=False), paths))

    def stat(self, path: str) -> OriginObject:
        """See Origin. The checksum is that of the list, if it has one."""
        check_path(path)
        return self._described(path, {} if self._names(path) else self._sums(), checked=True)

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. A range without bytes costs a HEAD."""
        check_path(item.path)
        url = self._file_url(item.path)
        if not length_bytes:
            self._check_version(item, self._session.head(url, item.path))
            yield read_nothing
            return
        asked = f"bytes={offset_bytes}-{offset_bytes + length_bytes - 1}"
        headers = {"Range": asked, **condition(item.version)}

        def begin(body: Body) -> None:
            answer = self._session.ask("GET", url, item.path, headers, expected_version=item.version)
            body.begin(answer.raw)
            self._check_version(item, answer)
            self._check_range(item, answer, offset_bytes, length_bytes)

        with range_read(begin, self._failures, item.path, asked, length_bytes, abort) as read_into:
            yield read_into

    def close(self) -> None:
        """See Origin. A later call connects anew."""
        self._session.close()

    @property
    def _last_part(self) -> str:
        return unquote(self._url.rpartition("/")[2])

    def _described(self, path: str, sums: Mapping[str, str], *, checked: bool) -> OriginObject:
        answer = self._session.head(self._file_url(path), path)
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > _MAX_DIGITS:
            raise self._failures.make(
                OriginError, "the server does not tell its size", path, cause="no size",
                hint="serve the files as they are, without compressing them on the way",
            )  # fmt: skip
        digest = sums.get(path, "")
        version = marker(answer.headers) or (f"sha256:{digest}" if digest else "")
        if not version:
            raise self._failures.make(
                OriginError, "the server tells neither ETag nor Last-Modified, and no list has a SHA-256 of it: a "
                "change while it is read could not be seen", path, cause="no version",
                hint="use a server that tells one of them, or a list with SHA-256",
            )  # fmt: skip
        checksums = (OriginChecksum("sha256", digest),) if digest and checked else ()
        return OriginObject(path=path, size_bytes=int(length), version=version, checksums=checksums)

    def _check_version(self, item: OriginObject, answer: Answer) -> None:
        found = marker(answer.headers)
        if not item.version.startswith("sha256:") and not same_version(item.version, found):
            answer.raw.close()
            raise self._failures.changed(item.path, item.version, found or "an answer without ETag and Last-Modified")

    def _check_range(self, item: OriginObject, answer: Answer, offset_bytes: int, length_bytes: int) -> None:
        headers = answer.headers
        fields = {"ContentRange": headers.get("Content-Range"), "ContentLength": headers.get("Content-Length")}
        problem = range_problem(fields, offset_bytes, length_bytes, item.size_bytes)
        if problem and answer.status == 200 and headers.get("Accept-Ranges", "none").lower() != "bytes":
            raise self._failures.make(
                OriginError, "the server does not serve ranges of files, and this one is larger than one", item.path,
                cause="no ranges",
                hint="use a server that does (nginx, Apache, any object store), or mount the files and use file://",
            )  # fmt: skip
        if problem:
            asked = f"bytes={offset_bytes}-{offset_bytes + length_bytes - 1}"
            raise self._failures.wrong_range(item.path, asked, problem)

    def _sums(self) -> dict[str, str]:
        """What the list says now; fetched again only if the server does not say that it is the same."""
        if self._named and not self._list_url:
            return {}
        url = self._list_url or f"{self._url}/{DEFAULT_LIST}"
        with self._lock:
            etag, sums = self._listed
        try:
            answer, data = self._session.text(url, "", {"If-None-Match": etag} if etag else {})
        except NotFoundError:
            raise NotFoundError(
                f"there is no list of files at {without_query(url)}",
                hint=f"put the output of sha256sum there as {DEFAULT_LIST}; or name another list, or the files, in the "
                "origin table of the catalog; or give the URL of one file",
                uri=self._url,
                path="",
            ) from None
        if answer.status == 304:
            return sums
        sums = parse_list(data, without_query(url))
        with self._lock:
            self._listed = answer.headers.get("ETag", ""), sums
        return sums

    def _is_one_file(self) -> bool:
        """Whether the URI is a file's; asked once."""
        if self._one_file is None:
            try:
                answer = self._session.head(self._url, "", on_hop=_refuse_folder)
                one = not urlsplit(answer.url).path.endswith("/")
            except (NotFoundError, _IsFolderError):
                one = False
            with self._lock:
                self._one_file = one
        return bool(self._one_file)

    def _names(self, path: str) -> bool:
        """Whether the path is the one of the file that the URI names."""
        return path == self._last_part and self._is_one_file()

    def _file_url(self, path: str) -> str:
        return self._url if self._names(path) else f"{self._url}/{quote(path)}"

    def _checked_list(self, given: str) -> str:
        if not given:
            return ""
        url = check_url("list", link_of(f"{self._url}/", given))
        if server_of(url)[0] != server_of(self._url)[0] == "https":
            refuse("list", "the list is at a less safe place than its files", "give it an https:// URL")
        return url


class _IsFolderError(Exception):
    """A server sends on to the same path with a slash at its end. Stays in this module."""


def _refuse_folder(hop: Hop) -> None:
    """Whatever is answered there: nginx refuses (403) a folder that it may not list, and serves what is in it."""
    if unquote(urlsplit(hop.location).path) == f"{unquote(urlsplit(hop.url).path)}/":
        raise _IsFolderError


def _checked_url(uri: str) -> str:
    try:
        url = check_url("source", uri)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"{re.sub('://[^/]*@', '://', re.split('[?#]', uri)[0])[:200]!r} cannot be the URL of a model",
            hint="write http(s)://HOST/FOLDER/ or the URL of one file, without user, password, query and fragment",
            value="source",
        ) from error
    return url + ("/" if uri.endswith("/") else "")


def _named_files(text: str) -> tuple[str, ...]:
    try:
        return tuple(check_path(line.strip()) for line in text.split("\n") if line.strip())
    except InvalidRequestError as error:
        raise InvalidRequestError(f"files: {error}", hint=error.hint, value="files") from error
