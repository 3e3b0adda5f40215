"""obstore's errors as the cache's: one table, with what to do next in each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cached.errors import CachedError, OriginDeniedError, OriginError, OriginProtocolError, OriginUnavailableError
from cached.origins.clouds.places import Place, first_lines, import_obstore
from cached.origins.net.failures import Failures

_STATUS = re.compile(r"status code: (\d{3})")
_PROTOCOL = ("non-partial response", "content-range", "content range", "requested", "end of stream", "unexpected eof")


class CloudFailures(Failures):
    """Typed errors that name the place and the kind of credentials."""

    def __init__(self, place: Place) -> None:
        if place.scheme == "gs":
            hint = (
                "look whether the credentials (credentials_file, GOOGLE_APPLICATION_CREDENTIALS, this host's identity) "
                f"may list and read bucket {place.container!r}; or set `anonymous` for a public one"
            )
        else:
            hint = (
                "look whether the credentials (AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY, AZURE_CLIENT_ID, …, "
                f"or a managed identity) may list and read container {place.container!r}; or set `anonymous`"
            )
        if place.anonymous:
            hint = f"{place.container!r} is not public: leave `anonymous` out, and give credentials"
        super().__init__(
            place.uri, place.server, secrets=(), denied_hint=hint,
            missing_hint=f"look at the URI: the {'bucket' if place.scheme == 'gs' else 'container'} and the prefix",
        )  # fmt: skip

    @contextmanager
    def typed(self, path: str) -> Iterator[None]:
        """Everything that goes wrong in the block leaves it as a CachedError, without secrets."""
        try:
            yield
        except CachedError:
            raise
        except Exception as error:  # noqa: BLE001 obstore raises builtins too; what is none of its is raised again
            raise self.told(error, path) from None

    def told(self, error: Exception, path: str) -> CachedError:
        """The typed error for one of obstore's."""
        errors = import_obstore().exceptions
        text = first_lines(error)
        if isinstance(error, FileNotFoundError):
            return self.missing(path)
        if isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError)):
            return self.make(
                OriginDeniedError, f"access denied: {text}", path, hint=self._denied_hint, cause=type(error).__name__
            )
        if not isinstance(error, (errors.BaseError, OSError, ValueError)):
            raise error
        return self._generic(error, text, path)

    def _generic(self, error: Exception, text: str, path: str) -> CachedError:
        lowered, everything = text.lower(), str(error)
        if status := _STATUS.search(text):
            return self.answered(int(status[1]), {}, text, path)
        if "certificate" in everything.lower():  # which only the internals tell
            return self.make(
                OriginError, f"its certificate is not trusted: {text}", path, cause="certificate",
                hint="give the file of its certificate authority as ca_bundle",
            )  # fmt: skip
        if any(word in lowered for word in _PROTOCOL):
            return self.make(
                OriginProtocolError, f"the answer is wrong: {text}", path, cause="protocol",
                hint="a server or proxy that does not keep to the protocol; try again, or look at the endpoint",
            )  # fmt: skip
        return self.make(
            OriginUnavailableError, text, path, cause=type(error).__name__,
            hint="look whether the endpoint is right and can be reached from this host",
        )  # fmt: skip
