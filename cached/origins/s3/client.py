"""botocore clients as the cache needs them; boto3, which takes a while to import, only for uploads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import IO, Any
from urllib.parse import urlsplit

import botocore
import botocore.exceptions
import botocore.httpsession
import botocore.session
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection, AWSPreparedRequest
from botocore.config import Config
from botocore.loaders import JSONFileLoader

from cached.errors import CachedError, InvalidRequestError
from cached.origins.net.addresses import Addresses
from cached.origins.net.connections import pool_classes
from cached.origins.net.exchange import Reply, ask
from cached.origins.s3.options import S3Options

# With botocore's default, when_supported, a ranged GET of an object with a full-object checksum can raise
# FlexibleChecksumError, and every upload carries a trailer that other servers refuse.
_CHECKSUMS = "when_required"
_UPLOAD_ATTEMPTS = 5
_SERVICES = ["s3", "sts", "sso", "sso-oidc", "signin"]
"""S3, and those that credentials may come from."""
_ALL_CONNECTIONS = 1024


class _Models(JSONFileLoader):  # type: ignore[misc]
    """botocore's descriptions as dicts: OrderedDicts take more than twice the time, and 4 MB more in each mover."""

    def _load_file(self, full_path: str, open_method: Callable[[str, str], IO[bytes]]) -> Any:
        if not os.path.isfile(full_path):
            return None
        with open_method(full_path, "rb") as file:
            return json.load(file)


class Connection:
    """A client for reading, made once, and what errors say of it. Making it may read files, but connects to nothing.

    ``denied``: a server has refused its credentials.
    """

    def __init__(self, options: S3Options) -> None:
        self.denied = False
        self._options = options
        self._pool_classes = pool_classes(Addresses(), AWSHTTPConnection, AWSHTTPSConnection)
        try:
            self._session = botocore.session.Session(profile=options.profile or None)
            if options.region:
                self._session.set_config_variable("region", options.region)
            loader = self._session.get_component("data_loader")
            loader.file_loader = _Models()
            # It would look through the folders of all 400 services, twice.
            loader.list_available_services = lambda *_, **__: _SERVICES
            self.client = self._make(attempts=1)
        except botocore.exceptions.ProfileNotFound as error:
            raise InvalidRequestError(
                f"there is no AWS profile {options.profile!r}",
                hint="look at ~/.aws/config of the user that the daemon runs as, or at AWS_CONFIG_FILE",
                value="profile",
            ) from error
        except (ValueError, botocore.exceptions.BotoCoreError) as error:
            raise InvalidRequestError(
                f"the S3 client cannot be set up: {error}",
                hint="look at the options of the origin and at the AWS environment",
                value=options.endpoint_url or "client",
            ) from error

    @property
    def endpoint_url(self) -> str:
        """Where requests go, without user information."""
        parts = urlsplit(str(self.client.meta.endpoint_url))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def credentials(self) -> Any:
        """What to sign the next request with, refreshed where they expire; None when there are none."""
        found = None if self._options.anonymous else self._session.get_credentials()
        return found and found.get_frozen_credentials()

    def send(self, request: AWSPreparedRequest) -> Any:
        """A request over the client's own connections: an AWSResponse. Raises what the client raises."""
        return self.client._endpoint.http_session.send(request)  # noqa: SLF001 the pools, proxies and TLS of the client

    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> Reply | None:
        """A GET or HEAD over an open connection of the client's; None where there is none, or a proxy is between."""
        session = self.client._endpoint.http_session  # noqa: SLF001
        if session._proxy_config.proxy_url_for(url):  # noqa: SLF001
            return None
        parts = urlsplit(url)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        return ask(session._manager.connection_from_url(url), method, target, headers)  # noqa: SLF001

    def credential_source(self) -> str:
        """Where the credentials come from, in words; never the credentials."""
        if self._options.anonymous:
            return "none (anonymous)"
        found = self._find_credentials()
        if found is None:
            return "none found"
        named = f" of profile {self._options.profile!r}" if self._options.profile else ""
        return f"{_SOURCES.get(str(found.method), str(found.method))}{named}"

    def credential_facts(self) -> tuple[bool, float | None]:
        """Whether they are temporary, and when they end (epoch) where that is known; they may renew themselves."""
        found = None if self._options.anonymous else self._find_credentials()
        if found is None:
            return False, None
        ends = getattr(found, "_expiry_time", None)
        return bool(getattr(found, "token", "")), ends.timestamp() if ends is not None else None

    def ca_file(self) -> str:
        """The file of certificate authorities that servers are checked against; empty: they are not."""
        verify = self.client._endpoint.http_session._verify  # noqa: SLF001 settings, environment and profile, resolved
        return str(botocore.httpsession.get_cert_path(verify) or "")

    def secrets(self) -> tuple[str, ...]:
        """What no text of ours may hold."""
        found = None if self._options.anonymous else self._find_credentials()
        if found is None:
            return ()
        try:
            frozen = found.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError:
            return ()
        return tuple(text for text in (frozen.secret_key, frozen.token, frozen.access_key) if text)

    def upload_client(self) -> Any:
        """A client that retries; uploads have no planner above them. What a progress callback raises ends them."""
        client = self._make(attempts=_UPLOAD_ATTEMPTS)
        client.meta.events.register_first("needs-retry.s3", _raise_own)
        return client

    def _find_credentials(self) -> Any:
        try:
            return self._session.get_credentials()
        except botocore.exceptions.BotoCoreError:
            return None

    def _make(self, attempts: int) -> Any:
        addressing = self._options.addressing
        if addressing == "auto" and self._options.endpoint_url:
            addressing = "path"
        client = self._make_with(addressing, attempts)
        if addressing == "auto" and not _is_aws(str(client.meta.endpoint_url)):
            # The endpoint came from the AWS environment or a profile, which only botocore reads.
            client.close()
            client = self._make_with("path", attempts)
        return client

    def _make_with(self, addressing: str, attempts: int) -> Any:
        options = self._options
        config = Config(
            s3={"addressing_style": addressing},
            signature_version=botocore.UNSIGNED if options.anonymous else None,
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            max_pool_connections=options.max_connections or _ALL_CONNECTIONS,
            retries={"mode": "standard", "total_max_attempts": attempts},
            tcp_keepalive=True,
            request_checksum_calculation=_CHECKSUMS,
            response_checksum_validation=_CHECKSUMS,
            user_agent_extra="cached",
        )
        if options.ca_bundle and not os.path.isfile(options.ca_bundle):
            raise ValueError(f"there is no CA bundle {options.ca_bundle!r}")
        client = self._session.create_client(
            "s3",
            endpoint_url=options.endpoint_url or None,
            verify=options.ca_bundle or None,
            config=config,
        )
        # Its own pool of direct connections; those through a proxy are made by others.
        client._endpoint.http_session._manager.pool_classes_by_scheme = self._pool_classes  # noqa: SLF001
        return client


_SOURCES = {
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the AWS configuration file",
    "iam-role": "the instance's role",
    "container-role": "the container's role",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a web identity token (IRSA)",
    "sso": "AWS SSO",
    "custom-process": "a credential process",
}


def _is_aws(endpoint_url: str) -> bool:
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _raise_own(caught_exception: Exception | None = None, **_: Any) -> None:
    """What our own code raised while a request was being sent: botocore takes it for the network's, and retries."""
    if isinstance(caught_exception, botocore.exceptions.HTTPClientError):
        own = caught_exception.kwargs.get("error")
        if isinstance(own, CachedError):
            raise own
