"""What goes wrong over HTTP as the cache's errors: one table, with what to do next in each."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.client import HTTPException

import urllib3.exceptions

from cached.errors import (
    CachedError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)

RAISED: tuple[type[BaseException], ...] = (urllib3.exceptions.HTTPError, HTTPException, OSError)
"""What urllib3 and the layers below it raise."""


class Failures:
    """Typed errors that name the origin. ``secrets``: what no text of ours may hold.

    ``denied_hint``: what to do about refused access; ``missing_hint``: about something that is not there.
    """

    raised = RAISED

    def __init__(self, uri: str, server: str, *, secrets: tuple[str, ...], denied_hint: str, missing_hint: str) -> None:
        self._uri = uri
        self._server = server
        self._secrets = tuple(secret for secret in secrets if secret)
        self._denied_hint = denied_hint
        self._missing_hint = missing_hint

    @contextmanager
    def typed(self, path: str) -> Iterator[None]:
        """Everything that breaks on the way in the block leaves it as a CachedError, without secrets."""
        try:
            yield
        except RAISED as error:
            # Not chained: the original's text may hold a signed URL.
            raise self.translate(error, path) from None

    def translate(self, error: BaseException, path: str, *, expected_version: str = "") -> CachedError:
        """The typed error for one of RAISED."""
        del expected_version
        if _is_certificate(error):
            return self.make(
                OriginError, f"its certificate is not trusted: {error}", path, cause="certificate",
                hint="give the file of its certificate authority as ca_bundle, and look whether the host's name is the "
                "one in the certificate",
            )  # fmt: skip
        if isinstance(error, urllib3.exceptions.ProxyError) and "Tunnel connection failed: 407" in str(error):
            return self._proxy_denied("answered 407", path)
        return self.make(
            OriginUnavailableError,
            f"it could not be reached, or the connection broke ({type(error).__name__}: {_bare(error)})",
            path,
            cause=type(error).__name__,
            hint="look whether the URL is right and can be reached from this host",
        )

    def answered(
        self, status: int, headers: Mapping[str, str], text: str, path: str, *, expected_version: str = ""
    ) -> CachedError:
        """The typed error for an answer that is no success. ``text``: what it says."""
        said = f"answered {status}" + (f" ({text})" if text else "")
        if expected_version and status in {412, 416}:
            return self.changed(path, expected_version, "a shorter object" if status == 416 else "another version")
        if status == 407:
            return self._proxy_denied(said, path)
        if status in {401, 403}:
            return self.make(
                OriginDeniedError, f"access denied: {said}", path, hint=self._denied_hint, cause=str(status)
            )
        if status in {404, 410}:
            return self.missing(path)
        if status in {408, 425, 429} or status >= 500:
            error = self.make(
                OriginUnavailableError, said, path, cause=str(status),
                hint="the server limits how often it may be asked: try again later, or with credentials that it knows"
                if status == 429 else "the server is overloaded or broken; try again later",
            )  # fmt: skip
            wait_s = _retry_after_s(headers.get("Retry-After", ""))
            if wait_s is not None:
                error.fields["retry_after_s"] = f"{wait_s:.3f}"
            return error
        return self.make(
            OriginError, said, path, cause=str(status), hint="look at the URL and the options of this origin"
        )

    def _proxy_denied(self, said: str, path: str) -> CachedError:
        return self.make(
            OriginDeniedError, f"the proxy on the way denies access: {said}", path, cause="407",
            hint="write the user and the password into the proxy's URL in the environment of the daemon, "
            "percent-encoded: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT (or HTTP_PROXY)",
        )  # fmt: skip

    def missing(self, path: str) -> NotFoundError:
        """It is not there."""
        return NotFoundError(
            f"{self._where(path)} is not there (at {self._server})", hint=self._missing_hint, uri=self._uri, path=path
        )

    def changed(self, path: str, expected: str, found: str) -> CachedError:
        """The object is no longer the version that was listed."""
        return self.make(
            ObjectChangedError, "it was replaced while it was being read", path, cause="changed",
            hint="pull again once nobody uploads to it", expected=expected, found=found,
        )  # fmt: skip

    def wrong_range(self, path: str, asked: str, problem: str) -> CachedError:
        """The answer is not the range that was asked for."""
        return self.make(
            OriginProtocolError, f"the answer to {asked} is wrong: {problem}", path, cause=problem,
            hint="a server or proxy that does not keep to the protocol; try again, or look at the URL",
        )  # fmt: skip

    def make(
        self, kind: type[OriginError], message: str, path: str, *, hint: str, cause: str, **fields: object
    ) -> OriginError:
        """An error of this origin; message and cause are cleaned of secrets."""
        where = f"{self._where(path)} at {self._server}"
        return kind(
            f"{where}: {self._clean(message)}", hint=hint, uri=self._uri, path=path, cause=self._clean(cause), **fields
        )

    def _where(self, path: str) -> str:
        names_itself = not path or self._uri.endswith(f"/{path}")  # the URI of a single object
        return self._uri if names_itself else f"{path} of {self._uri}"

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _SIGNED.sub(r"\1?***", text)[:1000]


_SIGNED = re.compile(r"((?:https?://|/)[^\s?'\"]*)\?[^\s'\")]+")
"""Queries of URLs may be signatures."""


def _bare(error: BaseException) -> str:
    """Without the object that urllib3 puts before some of its messages."""
    return re.sub(r"^<[^>]*>: ", "", str(error))


def _is_certificate(error: BaseException) -> bool:
    return isinstance(error, urllib3.exceptions.SSLError) and "CERTIFICATE" in str(error).upper()


def _retry_after_s(text: str) -> float | None:
    """Seconds from a Retry-After header, which holds them or a date."""
    if text.strip().isdecimal():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=dt.UTC)
    return max(0.0, (until - dt.datetime.now(dt.UTC)).total_seconds())
