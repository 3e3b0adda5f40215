"""What the two clouds differ in: URIs, options, endpoints, credentials, and the checksums that they tell."""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cached.errors import InvalidRequestError, OriginDeniedError
from cached.origins.base import OriginChecksum, OriginSpec
from cached.origins.net.options import NET_OPTIONS, NetOptions, check_known, net_options, refuse, truth
from cached.urls import check_url

GS_OPTIONS = ("credentials_file", "endpoint", "anonymous", *NET_OPTIONS)
AZ_OPTIONS = ("account", "endpoint", "anonymous", *NET_OPTIONS)
_CONTAINER = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]|\$root|\$web")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_GS = "https://storage.googleapis.com"
_GS_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_REQUEST_S = 24 * 3600.0
_TAG = re.compile(r"<[?/]?\w[^>]*>")
_HASH = re.compile(r"(?:^|,)\s*crc32c=([A-Za-z0-9+/=]+)")


@dataclass(frozen=True, slots=True)
class Place:
    """A prefix in a container of a cloud. ``options`` are parsed; ``endpoint`` is empty for Azure's own."""

    scheme: str
    container: str
    key: str
    only_prefix: bool
    endpoint: str
    anonymous: bool
    account: str
    credentials_file: str
    net: NetOptions

    @property
    def base(self) -> str:
        """What keys of objects below the URI begin with."""
        return f"{self.key}/" if self.key else ""

    @property
    def last_part(self) -> str:
        """The object's path, if the URI names one object."""
        return self.key.rpartition("/")[2]

    @property
    def uri(self) -> str:
        """Without a slash at its end."""
        return f"{self.scheme}://{self.container}/{self.key}".rstrip("/")

    @property
    def server(self) -> str:
        """Where requests go, for people."""
        return self.endpoint or f"Azure account {self.account or '(from the environment)'}"


def parse_place(spec: OriginSpec) -> Place:
    """Raises InvalidRequestError for a URI or option that is wrong."""
    scheme, _, rest = spec.uri.partition("://")
    scheme = scheme.lower()
    container, _, key = rest.partition("/")
    if not _CONTAINER.fullmatch(container):
        shown = re.sub(r"://[^/]*@", "://", spec.uri)[:200]
        raise InvalidRequestError(
            f"{shown!r} does not name a {'bucket of Google Cloud Storage' if scheme == 'gs' else 'container of Azure'}",
            hint=f"write {scheme}://{'BUCKET' if scheme == 'gs' else 'CONTAINER'}/PREFIX, a name of 3 or more "
            "lower-case letters and digits; credentials come from the environment, never from the URI",
            value=shown,
        )
    given = spec.options
    check_known(scheme, given, GS_OPTIONS if scheme == "gs" else AZ_OPTIONS)
    account = given.get("account", "")
    if account and not _ACCOUNT.fullmatch(account):
        refuse(
            "account", f"{account[:80]!r} is no account of Azure Storage", "write its name: 3 to 24 letters and digits"
        )
    endpoint = check_url("endpoint", given["endpoint"]) if given.get("endpoint") else _GS if scheme == "gs" else ""
    return Place(
        scheme=scheme, container=container, key=key.rstrip("/"), only_prefix=not key or key.endswith("/"),
        endpoint=endpoint, anonymous=truth("anonymous", given.get("anonymous") or "false"), account=account,
        credentials_file=given.get("credentials_file", ""), net=net_options(given),
    )  # fmt: skip


def import_obstore() -> Any:
    """The library. Raises InvalidRequestError, with the command that installs it, where it is missing."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise InvalidRequestError(
            f"gs:// and az:// origins need a library that is not installed: {error}",
            hint="install it beside the daemon: pip install 'cached[gs]' or pip install 'cached[az]'",
            value="obstore",
        ) from error
    return obstore


def open_store(place: Place, token: Callable[[], Any] | None, *, retries: int) -> Any:
    """The store of a place, by obstore; connects to nothing. ``token``: what obstore asks for Google credentials."""
    obstore = import_obstore()
    net = place.net
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=net.connect_timeout_s),
        "read_timeout": timedelta(seconds=net.read_timeout_s),
        "timeout": timedelta(seconds=_REQUEST_S),  # of a whole request: its default breaks slow large ranges
        "allow_http": place.endpoint.startswith("http://"),
        "user_agent": "cached",
    }
    if net.ca_bundle:
        client["root_certificate"] = Path(net.ca_bundle).read_bytes()
    config: dict[str, Any] = {"skip_signature": True} if place.anonymous else {}
    common = {"client_options": client, "retry_config": {"max_retries": retries}}
    try:
        if place.scheme == "gs":
            config["base_url"] = place.endpoint
            return obstore.store.GCSStore(place.container, config=config, credential_provider=token, **common)
        if place.endpoint:
            config["endpoint"] = place.endpoint
        if place.account:
            config["account_name"] = place.account
        return obstore.store.AzureStore(place.container, config=config, **common)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise InvalidRequestError(
            f"{place.uri} cannot be opened: {first_lines(error)}",
            hint="look at the options of the origin and, for Azure, at `account` or AZURE_STORAGE_ACCOUNT_NAME",
            value=place.scheme,
        ) from None


def first_lines(error: BaseException) -> str:
    """What a library's error says in one line, without the internals that obstore writes below it, and without XML."""
    told = str(error).partition("\n\nDebug source")[0]
    return " ".join(_TAG.sub(" ", told).split())


class GoogleToken:
    """Google's credentials, found by google-auth in the usual places, or in a file. Connects when called."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._credentials: Any = None

    def __call__(self) -> Any:
        """What obstore wants of a provider."""
        with self._lock:
            self._refresh()
            return {"token": self._credentials.token, "expires_at": self._credentials.expiry.replace(tzinfo=UTC)}

    def header(self) -> str:
        """The Authorization header of a request."""
        return f"Bearer {self()['token']}"

    def _refresh(self) -> None:
        try:
            import google.auth.exceptions
            import google.auth.transport.urllib3
            import google.oauth2.service_account
            import urllib3
        except ImportError as error:
            raise InvalidRequestError(
                f"gs:// origins need a library that is not installed: {error}",
                hint="install it beside the daemon: pip install 'cached[gs]'; public buckets do without: `anonymous`",
                value="google-auth",
            ) from error
        try:
            if self._credentials is None:
                self._credentials = self._found(google)
            if not self._credentials.valid or self._credentials.expired:
                transport: Any = google.auth.transport.urllib3.Request
                self._credentials.refresh(transport(urllib3.PoolManager()))
        except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise OriginDeniedError(
                f"{self._place.uri}: no usable Google credentials: {error}",
                hint="name a service account's key as credentials_file or in GOOGLE_APPLICATION_CREDENTIALS, give this "
                "host or pod an identity that may read the bucket, or set `anonymous` for a public one",
                uri=self._place.uri,
                path="",
                cause=type(error).__name__,
            ) from None

    def _found(self, google: Any) -> Any:
        if self._place.credentials_file:
            kind = google.oauth2.service_account.Credentials
            return kind.from_service_account_file(self._place.credentials_file, scopes=[_GS_SCOPE])
        return google.auth.default(scopes=[_GS_SCOPE])[0]


def content_url(place: Place, key: str) -> str:
    """Of an object of Google's, for a HEAD of its headers."""
    return f"{place.endpoint}/{quote(place.container)}/{quote(key)}"


def google_checksum(hashes: str) -> OriginChecksum | None:
    """The CRC32C in ``x-goog-hash``, which Google computes of every object."""
    match = _HASH.search(hashes)
    try:
        digest = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        return None
    return OriginChecksum("crc32c", digest.hex()) if len(digest) == 4 else None
