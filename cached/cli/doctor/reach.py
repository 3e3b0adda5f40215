"""The way to a server, step by step: its name, its addresses, a connection, its certificate, its clock."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 4.0
_TRIED_ADDRESSES = 4


class UnreachableError(Exception):
    """The step that failed, in words, and what to do."""

    def __init__(self, told: str, mend: str) -> None:
        super().__init__(told)
        self.mend = mend


@dataclass(slots=True)
class Way:
    """What was found on the way. ``days_left``: of the certificate; None where there is none."""

    addresses: int = 0
    connect_ms: list[float] = field(default_factory=list)
    tls_ms: float = 0.0
    issuer: str = ""
    days_left: float | None = None
    skew_s: float | None = None


def way_to(url: str, *, ca_file: str, bundle_setting: str) -> Way:
    """Follows the way to an http(s) URL. ``ca_file`` empty: the system's. Raises UnreachableError."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    way = Way()
    found = _resolve(host, port)
    way.addresses = len(found)
    way.connect_ms = _connect_times_ms(found, host, port)
    if parts.scheme == "https":
        _look_at_certificate(way, host, port, ca_file, bundle_setting)
    way.skew_s = _skew_s(url, ca_file)
    return way


def connects(host: str, port: int) -> float:
    """Milliseconds to a TCP connection. Raises UnreachableError."""
    return min(_connect_times_ms(_resolve(host, port), host, port))


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        told = f"the name {host} is not known here ({error.strerror})"
        raise UnreachableError(
            told, f"getent ahosts {host}   (look at the endpoint's name and /etc/resolv.conf)"
        ) from error
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in answers))


def _connect_times_ms(found: list[tuple[int, Any]], host: str, port: int) -> list[float]:
    """Of those that answer; a server of which some addresses do not is reached by the others."""
    times_ms: list[float] = []
    failure: OSError | None = None
    for family, address in found[:_TRIED_ADDRESSES]:
        began_s = time.perf_counter()
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(TIMEOUT_S)
                probe.connect(address)
        except OSError as error:
            failure = error
            continue
        times_ms.append(1000 * (time.perf_counter() - began_s))
    if not times_ms:
        why = "nothing answers" if isinstance(failure, TimeoutError) else str(failure and failure.strerror)
        hint = "a firewall or network policy may drop it" if isinstance(failure, TimeoutError) else "is it running?"
        told = f"{host} does not take connections on port {port}, at none of its {len(found)} addresses ({why})"
        if len(found) == 1:
            told = f"{host} does not take connections on port {port} ({why})"
        raise UnreachableError(told, f"nc -vz {host} {port}   ({hint})") from failure
    return times_ms


def _look_at_certificate(way: Way, host: str, port: int, ca_file: str, bundle_setting: str) -> None:
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        told = f"the CA bundle {ca_file} cannot be read: {error.strerror or error}"
        raise UnreachableError(told, f"{bundle_setting} = a PEM file that the daemon's user may read") from error
    began_s = time.perf_counter()
    try:
        certificate = _handshake(context, host, port)
    except ssl.SSLCertVerificationError as error:
        raise _refused(error, host, port, ca_file, bundle_setting) from error
    except (ssl.SSLError, OSError) as error:
        told = f"{host}:{port} does not speak TLS as it should: {error}"
        raise UnreachableError(told, f"curl -vI https://{host}:{port}   (or is it http:// there?)") from error
    way.tls_ms = 1000 * (time.perf_counter() - began_s)
    way.issuer = _named(certificate.get("issuer", ()))
    way.days_left = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400


def _handshake(context: ssl.SSLContext, host: str, port: int) -> dict[str, object]:
    with (
        socket.create_connection((host, port), TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return dict(secure.getpeercert() or {})


_EXPIRED, _NOT_YET, _SELF_SIGNED, _SELF_IN_CHAIN = 10, 9, 18, 19
_NO_ISSUER = (2, 20, 21)
_NAME_MISMATCH = (62, 64)
"""X509_V_ERR_…, as x509_vfy.h of OpenSSL numbers them."""


def _refused(
    error: ssl.SSLCertVerificationError, host: str, port: int, ca_file: str, bundle_setting: str
) -> UnreachableError:
    """Why a certificate is not trusted, and what mends that."""
    code, shown = error.verify_code, _certificate_of(host, port)
    issuer = _named(shown.get("issuer", ()))
    against = f"against {ca_file}" if ca_file else "against the system's authorities"
    if code == _EXPIRED:
        return UnreachableError(
            f"the certificate of {host} ended on {shown.get('notAfter', 'a day before today')}",
            f"renew it on the server   (is this host's clock right? {time.strftime('%Y-%m-%d %H:%M:%S')})",
        )
    if code == _NOT_YET:
        return UnreachableError(f"the certificate of {host} is not valid yet", "date   (is this host's clock right?)")
    if code in _NAME_MISMATCH:
        pairs = shown.get("subjectAltName", ())
        names = ", ".join(str(pair[1]) for pair in pairs) if isinstance(pairs, tuple) else ""
        return UnreachableError(
            f"the certificate of {host} is for other names: {names or 'none'}", "use one of these in the endpoint's URL"
        )
    save = f"openssl s_client -connect {host}:{port} -showcerts </dev/null   (take its authority from there, or from "
    save += f"who runs it), then {bundle_setting}=/path/ca.pem"
    if code in {_SELF_SIGNED, _SELF_IN_CHAIN}:
        return UnreachableError(f"the certificate of {host} is signed by itself ({issuer}), checked {against}", save)
    if code in _NO_ISSUER:
        return UnreachableError(f"the authority of {host} is not known here ({issuer}), checked {against}", save)
    return UnreachableError(
        f"the certificate of {host} is not trusted: {error.verify_message}, checked {against}", save
    )


def _certificate_of(host: str, port: int) -> dict[str, object]:
    """What the server shows, trusted for this one look; empty where even that does not go."""
    try:
        pem = ssl.get_server_certificate((host, port), timeout=TIMEOUT_S)
        context = ssl.create_default_context(cadata=pem)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return _handshake(context, host, port)
    except (OSError, ValueError):
        return {}


def _named(name: object) -> str:
    """``O=…, CN=…`` of a name as ssl gives it."""
    known = dict(pair for part in name for pair in part) if isinstance(name, tuple) else {}
    return ", ".join(str(known[key]) for key in ("organizationName", "commonName") if key in known) or "unnamed"


def _skew_s(url: str, ca_file: str) -> float | None:
    """This clock's time less the server's, from the Date of any answer; None where it tells none."""
    parts = urlsplit(url)
    try:
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=ca_file or None)
            connection = http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
        try:
            connection.request("HEAD", "/", headers={"User-Agent": "cached-doctor"})
            told = connection.getresponse().headers.get("Date", "")
        finally:
            connection.close()
        return time.time() - parsedate_to_datetime(told).timestamp()
    except (OSError, ValueError, http.client.HTTPException):
        return None
