"""botocore's errors as the cache's: one table, with what to do next in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

import botocore.exceptions
import urllib3.exceptions

from cached.errors import (
    CachedError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)
from cached.origins.s3.client import Connection
from cached.origins.s3.options import S3Location

_DENIED = {
    "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken", "ExpiredTokenException",
    "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired",
    "UnauthorizedAccess", "UnsupportedAlgorithm", "NotSignedUp", "RequestExpired", "401", "403",
}  # fmt: skip  # rclone's UnsupportedAlgorithm: the request has no signature
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound", "404", "MethodNotAllowed"}
_BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "TooManyRequests"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOError,
    botocore.exceptions.NoAuthTokenError,
)
_NETWORK = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    HTTPException,
    OSError,
)

RAISED = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, *_NETWORK)
"""What botocore and the layers below it raise."""


class Failures:
    """Turns what botocore raises into typed errors that name the endpoint, the bucket and the kind of credentials."""

    raised: tuple[type[BaseException], ...] = RAISED

    def __init__(self, location: S3Location, connection: Connection) -> None:
        self._location = location
        self._connection = connection

    @contextmanager
    def typed(self, path: str, *, expected_version: str = "") -> Iterator[None]:
        """Everything that goes wrong in the block leaves it as a CachedError, without secrets."""
        try:
            yield
        except RAISED as error:
            # Not chained: the original's text may hold what the server echoed of the request.
            raise self.translate(error, path, expected_version=expected_version) from None
        except (ValueError, OverflowError) as error:  # botocore's, of a number or a date that is none
            raise self.make(
                OriginProtocolError, f"its answer cannot be read: {error}", path, cause=type(error).__name__,
                hint="look whether the endpoint is an S3 server; try again if it is",
            ) from None  # fmt: skip

    def make(
        self, kind: type[OriginError], message: str, path: str, *, hint: str, cause: str, **fields: object
    ) -> OriginError:
        """An error of this origin; ``cause`` is cleaned of secrets."""
        where = f"{self._where(path)} at {self._connection.endpoint_url}"
        return kind(
            f"{where}: {self._clean(message)}",
            hint=hint,
            uri=self._uri(),
            path=path,
            cause=self._clean(cause),
            **fields,
        )

    def translate(self, error: BaseException, path: str, *, expected_version: str = "") -> CachedError:
        """The typed error for one of RAISED."""
        if isinstance(error, botocore.exceptions.ClientError):
            return self._answered(error, path, expected_version)
        if isinstance(error, _NO_CREDENTIALS):
            return self._denied(f"no usable credentials: {error}", path, type(error).__name__)
        if _is_certificate(error):
            return self.make(
                OriginError, f"its certificate is not trusted: {error}", path, cause="certificate",
                hint="give the file of its certificate authority as ca_bundle (or AWS_CA_BUNDLE), and look whether the "
                "endpoint's name is the one in the certificate",
            )  # fmt: skip
        if isinstance(error, botocore.exceptions.ParamValidationError):
            return InvalidRequestError(
                f"{self._where(path)} cannot be asked for: {self._clean(str(error))}",
                hint="look at the bucket's name and the key",
                value=self._uri(),
            )
        if isinstance(error, _NETWORK):
            return self.make(
                OriginUnavailableError, f"{_in_words(error)}", path, cause=type(error).__name__,
                hint="look whether the endpoint is right and can be reached from this host",
            )  # fmt: skip
        return self.make(
            OriginError, str(error), path, cause=type(error).__name__, hint="look at the S3 settings of this origin"
        )

    def _answered(self, error: botocore.exceptions.ClientError, path: str, expected_version: str) -> CachedError:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", "")) or str(status)
        text = str(error.response.get("Error", {}).get("Message", "")) or code
        if status in {412, 416} or (code == "NoSuchVersion" and expected_version):
            found = "a shorter object" if status == 416 else "another version"
            return self.changed(path, expected_version, found)
        if code == "InvalidObjectState":
            return self.make(
                OriginError, "it is archived", path, cause=code, hint="restore it from its archive storage class first"
            )
        if code in _DENIED or status in {401, 403}:
            return self._denied(text if code == text else f"{code}: {text}", path, code)
        if code in _MISSING or status == 404:
            return self._missing(code, path)
        if code in _BUSY or status >= 500 or status == 429:
            return self.make(
                OriginUnavailableError, f"answered {status or code} ({code}: {text})", path, cause=code,
                hint="the server is overloaded or broken; try again later",
            )  # fmt: skip
        return self.make(OriginError, f"answered {status} ({code}: {text})", path, cause=code, hint=_other_hint(code))

    def changed(self, path: str, expected: str, found: str) -> ObjectChangedError:
        """The object is no longer the version that was listed."""
        error = self.make(
            ObjectChangedError, "it was replaced while it was being read", path, cause="changed",
            hint="pull again once nobody uploads to it", expected=expected, found=found,
        )  # fmt: skip
        assert isinstance(error, ObjectChangedError)  # noqa: S101 `make` gives the kind that it is asked for
        return error

    def wrong_range(self, path: str, asked: str, problem: str) -> OriginError:
        """The answer is not the range that was asked for."""
        return self.make(
            OriginProtocolError, f"the answer to {asked} is wrong: {problem}", path, cause=problem,
            hint="a server or proxy that does not keep to the protocol; try again, or look at the endpoint",
        )  # fmt: skip

    def _denied(self, message: str, path: str, code: str) -> CachedError:
        self._connection.denied = True
        source = self._connection.credential_source()
        hint = (
            "set this host's clock: it differs from the server's"
            if code in _CLOCK
            else f"credentials come from: {source}; look whether they are right, valid and allowed to list and read "
            f"bucket {self._location.bucket!r}, or set `anonymous` for a public bucket"
        )
        return self.make(
            OriginDeniedError, f"access denied ({message})", path, hint=hint, cause=code, credentials=source
        )

    def _missing(self, code: str, path: str) -> CachedError:
        endpoint = self._connection.endpoint_url
        if code == "NoSuchBucket":
            return NotFoundError(
                f"there is no bucket {self._location.bucket!r} at {endpoint}",
                hint="look at the bucket's name and the endpoint",
                uri=self._uri(),
                path=path,
            )
        return NotFoundError(
            f"{self._where(path)} is not there (at {endpoint})",
            hint="look at the URI; `aws s3 ls` with the same endpoint shows what is there",
            uri=self._uri(),
            path=path,
        )

    def _where(self, path: str) -> str:
        names_itself = not path or self._uri().endswith(f"/{path}")  # the URI of a single object
        return self._uri() if names_itself else f"{path} of {self._uri()}"

    def _uri(self) -> str:
        return f"s3://{self._location.bucket}/{self._location.key}".rstrip("/")

    def _clean(self, text: str) -> str:
        for secret in self._connection.secrets():
            text = text.replace(secret, "***")
        return text[:1000]


def _is_certificate(error: BaseException) -> bool:
    return isinstance(error, botocore.exceptions.SSLError) and "CERTIFICATE" in str(error).upper()


def _in_words(error: BaseException) -> str:
    return f"it could not be reached, or the connection broke ({type(error).__name__}: {error})"


def _other_hint(code: str) -> str:
    if code in {"301", "PermanentRedirect", "307", "IllegalLocationConstraintException"}:
        return "set the region of the bucket"
    if code in {"400", "BadRequest", "Bad Request"}:
        return "the credentials may have expired, or the region is not the bucket's"
    return "look at the S3 settings of this origin"
