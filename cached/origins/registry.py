"""Which origin serves which URI. The module of an origin, and its library, is loaded when the first one is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit, urlunsplit

from cached.errors import InvalidRequestError
from cached.origins.base import Origin, OriginObject, OriginSpec, WritableOrigin


def _open_local(spec: OriginSpec) -> WritableOrigin:
    from cached.origins.local import LocalOrigin

    return LocalOrigin(spec)


def _open_s3(spec: OriginSpec) -> WritableOrigin:
    from cached.origins.s3 import S3Origin

    return S3Origin(spec)


def _open_http(spec: OriginSpec) -> Origin:
    from cached.origins.http import HttpOrigin

    return HttpOrigin(spec)


def _open_hub(spec: OriginSpec) -> Origin:
    from cached.origins.hub import HubOrigin

    return HubOrigin(spec)


def _open_cloud(spec: OriginSpec) -> WritableOrigin:
    from cached.origins.clouds import CloudOrigin

    return CloudOrigin(spec)


_WRITABLE: dict[str, Callable[[OriginSpec], WritableOrigin]] = {"az": _open_cloud, "file": _open_local, "s3": _open_s3}
_READABLE: dict[str, Callable[[OriginSpec], Origin]] = {
    **_WRITABLE, "gs": _open_cloud, "hf": _open_hub, "http": _open_http, "https": _open_http,
}  # fmt: skip


def open_origin(spec: OriginSpec) -> Origin:
    """The origin for a spec. Connects to nothing yet. Raises InvalidRequestError for a URI or option that is wrong."""
    opener = _READABLE.get(_scheme(spec))
    if opener is None:
        raise _unknown(spec, _READABLE)
    return opener(spec)


def open_writable(spec: OriginSpec) -> WritableOrigin:
    """As ``open_origin``, for an origin that can also be uploaded to. Raises InvalidRequestError."""
    opener = _WRITABLE.get(_scheme(spec))
    if opener is None:
        raise _unknown(spec, _WRITABLE)
    return opener(spec)


def check_scheme(uri: str) -> None:
    """Raises InvalidRequestError for a URI that no origin serves."""
    spec = OriginSpec(uri)
    if _scheme(spec) not in _READABLE:
        raise _unknown(spec, _READABLE)


def pinned_spec(spec: OriginSpec, listed: Sequence[OriginObject]) -> OriginSpec:
    """The place of what was listed, such that nothing of it is read from a later state of a place that moves on.

    Of a branch of a hub that is the commit which was listed. Other places are as they are.
    """
    if _scheme(spec) != "hf" or not listed:
        return spec
    from cached.origins.hub.location import pinned

    return pinned(spec, listed[0].version)


def _scheme(spec: OriginSpec) -> str:
    scheme, separator, _ = spec.uri.partition("://")
    return scheme.lower() if separator else ""


def _unknown(spec: OriginSpec, known: Iterable[str]) -> InvalidRequestError:
    shown = redact(spec.uri)[:200]
    schemes = ", ".join(f"{name}://" for name in sorted(known))
    if _scheme(spec) in _READABLE:
        return InvalidRequestError(
            f"nothing can be uploaded to {shown!r}", hint=f"write a URI that begins with one of: {schemes}", value=shown
        )
    return InvalidRequestError(
        f"no origin serves {shown!r}", hint=f"write a URI that begins with one of: {schemes}", value=shown
    )


def redact(uri: str) -> str:
    """A URI that may be logged: without user name, password, query and fragment."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0] + "://…"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
