"""Which origin serves which URI. An origin's module, and with it boto3, is loaded when its first origin is opened."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from cached.errors import InvalidRequestError
from cached.origins.base import Origin, OriginSpec, WritableOrigin


def _open_local(spec: OriginSpec) -> WritableOrigin:
    from cached.origins.local import LocalOrigin

    return LocalOrigin(spec)


def _open_s3(spec: OriginSpec) -> WritableOrigin:
    from cached.origins.s3 import S3Origin

    return S3Origin(spec)


_WRITABLE: dict[str, Callable[[OriginSpec], WritableOrigin]] = {"file": _open_local, "s3": _open_s3}


def supported_schemes() -> tuple[str, ...]:
    """Schemes of URIs that ``open_origin`` knows, sorted."""
    return tuple(sorted(_WRITABLE))


def open_origin(spec: OriginSpec) -> Origin:
    """The origin for a spec. Connects to nothing yet. Raises InvalidRequestError for a URI or option that is wrong."""
    return open_writable(spec)


def open_writable(spec: OriginSpec) -> WritableOrigin:
    """As ``open_origin``, for an origin that can also be uploaded to. Raises InvalidRequestError."""
    scheme, separator, _ = spec.uri.partition("://")
    opener = _WRITABLE.get(scheme.lower()) if separator else None
    if opener is None:
        known = ", ".join(f"{name}://" for name in supported_schemes())
        raise InvalidRequestError(
            f"no origin serves {redact(spec.uri)[:200]!r}",
            hint=f"write a URI that begins with one of: {known}",
            value=redact(spec.uri)[:200],
        )
    return opener(spec)


def redact(uri: str) -> str:
    """A URI that may be logged: without user name, password, query and fragment."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0] + "://…"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
