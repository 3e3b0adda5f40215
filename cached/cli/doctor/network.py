"""Checks of the origins that models come from: each bucket, host or account once, step by step as a pull goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cached.catalog_file import CatalogModel, load_catalog
from cached.cli.doctor.access import obstacle
from cached.cli.doctor.checks import Context, Finding, advice, ok, problem, unseen
from cached.cli.doctor.reach import UnreachableError, Way, connects, way_to
from cached.cli.measure.facts import mount_of
from cached.config import hub_endpoint, origin_defaults, proxy_of
from cached.errors import CachedError, ConfigError
from cached.origins.base import OriginSpec
from cached.origins.registry import open_origin, redact
from cached.origins.s3.options import parse_options as s3_options
from cached.urls import check_url, local_path

if TYPE_CHECKING:
    from cached.origins.s3.probe import S3Facts

_MAX_PLACES = 16
_THREADS = 8
_SKEW_ADVICE_S, _SKEW_REFUSED_S = 30.0, 900.0
"""S3 refuses requests that are signed more than 15 minutes off. AWS, RequestTimeTooSkewed."""
_FEW_DAYS = 14.0
_SOON_S = 600.0
_GS = "https://storage.googleapis.com"
_READ_ACTIONS = "s3:ListBucket on the bucket, s3:GetObject on its objects"


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket, host or account, looked at through one of the models that come from it."""

    spec: OriginSpec
    model: str
    others: int
    has_digests: bool
    """The catalog says what the content is to be, so that nothing else has to."""

    @property
    def uri(self) -> str:
        """For people, without secrets."""
        return redact(self.spec.uri)

    @property
    def scheme(self) -> str:
        """In lower case."""
        return self.spec.uri.partition("://")[0].lower()


def places(context: Context) -> list[Place]:
    """Of the catalog, of the destination of compile artifacts, and what was asked for. Raises ConfigError."""
    defaults = origin_defaults(context.config)
    file = context.config.daemon.catalog
    wanted: list[tuple[str, OriginSpec, bool]] = []
    for model in (load_catalog(Path(file)).models if file else {}).values():
        wanted += [(model.name, _spec(uri, defaults, options), bool(model.sha256)) for uri, options in _sources(model)]
    others = (*context.sources, context.config.artifacts.destination)
    wanted += [("", _spec(uri, defaults, {}), uri not in context.sources) for uri in others if uri]
    found: dict[tuple[str, ...], list[tuple[str, OriginSpec, bool]]] = {}
    for item in wanted:
        found.setdefault(_key(item[1]), []).append(item)
    return [
        Place(items[0][1], items[0][0], len(items) - 1, all(digests for _, _, digests in items))
        for items in found.values()
    ]


def _sources(model: CatalogModel) -> Iterator[tuple[str, dict[str, str]]]:
    """Every link of its chain: the source itself, and the places in front of it."""
    yield model.source, dict(model.origin)
    yield from ((link.source, dict(link.origin)) for link in model.front)


def _spec(uri: str, defaults: dict[str, dict[str, str]], options: dict[str, str]) -> OriginSpec:
    return OriginSpec(uri, defaults.get(uri.partition("://")[0].lower(), {}) | options)


def _key(spec: OriginSpec) -> tuple[str, ...]:
    scheme, _, rest = spec.uri.partition("://")
    place = "" if scheme.lower() == "hf" else rest if scheme.lower() == "file" else rest.partition("/")[0]
    return (scheme.lower(), place, *(f"{name}={value}" for name, value in sorted(spec.options.items())))


def origins(context: Context) -> Iterator[Finding]:
    """Looks at each place, several at a time, and tells of them in the catalog's order."""
    try:
        found = places(context)
    except ConfigError as error:
        yield unseen(f"the catalog cannot be used: {error.message}", "cached catalog validate FILE")
        return
    if not found:
        yield ok("no origin is configured; look at one with --source URI")
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="origins") as executor:
        try:
            for findings in executor.map(lambda place: _look(context, place), found[:_MAX_PLACES]):
                yield from findings
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
    if len(found) > _MAX_PLACES:
        yield unseen(f"{len(found) - _MAX_PLACES} more places are not looked at", "cached doctor --source URI")


def _look(context: Context, place: Place) -> list[Finding]:
    """Everything about one place; an error of one does not end the others."""
    try:
        if place.scheme == "file":
            return list(_local(context, place))
        if place.scheme == "s3":
            return list(_s3(place))
        return list(_other(context, place))
    except CachedError as error:
        return [problem(f"{_named(place)}: {error.message}", error.hint)]
    except OSError as error:
        return [unseen(f"{_named(place)}: {error}")]
    except Exception as error:  # noqa: BLE001 the boundary of a place: the others are to be looked at all the same
        return [unseen(f"{_named(place)}: {type(error).__name__}: {error}")]


def _named(place: Place) -> str:
    more = f" and {place.others} more" if place.others else ""
    return f"{place.uri} ({place.model}{more})" if place.model else place.uri


def _local(context: Context, place: Place) -> Iterator[Finding]:
    path = local_path(place.spec.uri)
    try:
        closed = obstacle(context.service, path, os.R_OK)
    except FileNotFoundError:
        yield problem(f"{_named(place)}: it is not there", f"ls -l {path}   (is the file system mounted?)")
        return
    if closed:
        yield problem(f"{_named(place)}: {context.service.name} may not read {closed}", f"chmod a+rX {closed}")
        return
    mount = mount_of(path, context.proc)
    yield ok(f"{_named(place)}: {context.service.name} may read it" + (f", {mount.fs_type}" if mount else ""))


def _other(context: Context, place: Place) -> Iterator[Finding]:
    """Anything over HTTP but S3."""
    options, scheme = place.spec.options, place.scheme
    if scheme in {"http", "https"}:
        url = f"{scheme}://{urlsplit(check_url('source', place.spec.uri)).netloc}"
    elif scheme == "hf":
        url = options.get("endpoint") or hub_endpoint(context.environment)
    elif scheme == "gs":
        url = options.get("endpoint") or _GS
    else:
        account = options.get("account") or context.environment.get("AZURE_STORAGE_ACCOUNT_NAME", "")
        url = options.get("endpoint") or (f"https://{account}.blob.core.windows.net" if account else "")
    own = f"the catalog's models.{place.model or 'NAME'}.origin.ca_bundle"
    setting = "CACHED_HF_CA_BUNDLE" if scheme == "hf" else own
    if url:
        check_url("endpoint", url)
        way = _follow(url, options.get("ca_bundle", ""), setting)
        if isinstance(way, Finding):
            yield _prefixed(place, way)
            return
        yield from _of_the_way(place, url, way)
    origin = open_origin(place.spec)
    try:
        began_s = time.perf_counter()
        listed = origin.list_objects()
        list_ms = 1000 * (time.perf_counter() - began_s)
        sample = max(listed, key=lambda item: item.size_bytes)
        described = origin.stat(sample.path)
        if described.size_bytes:
            with origin.open_range(described, 0, 1) as read_into:
                read_into(memoryview(bytearray(1)))
    finally:
        origin.close()
    yield ok(f"{_named(place)}: lists {len(listed)} objects in {list_ms:.0f} ms, and a byte is read", list_ms=list_ms)
    yield from _integrity(place, [item.algorithm for item in described.checksums], sample.path)


def _follow(url: str, ca_file: str, setting: str) -> Way | Finding | None:
    """The way to a server; None behind a proxy, which is followed instead."""
    proxy = proxy_of(url)
    try:
        if not proxy:
            return way_to(url, ca_file=ca_file, bundle_setting=setting)
        parts = urlsplit(proxy)
        connects(parts.hostname or "", parts.port or 3128)
    except UnreachableError as error:
        through = f"its proxy {redact(proxy)}: " if proxy else ""
        return problem(f"{through}{error}", error.mend)
    return None


def _of_the_way(place: Place, url: str, way: Way | None) -> Iterator[Finding]:
    """What is worth telling of a way that leads there."""
    host = urlsplit(url).netloc.rpartition("@")[2]
    if way is None:
        told = f"{place.uri}: {host} is reached through the proxy {redact(proxy_of(url))}, at whatever speed that has"
        yield advice(told, f"export NO_PROXY={host.partition(':')[0]}   (if there is a direct way)")
        return
    fastest = min(way.connect_ms)
    measured = {"addresses": float(way.addresses), "connect_ms": fastest}
    told = f"{place.uri}: {host} has {_count(way.addresses, 'address', 'addresses')}, connects in {fastest:.1f} ms"
    if way.days_left is not None:
        measured |= {"tls_ms": way.tls_ms, "certificate_days": way.days_left}
        told += f", TLS in {way.tls_ms:.0f} ms (by {way.issuer}, {way.days_left:.0f} days left)"
    yield ok(told, **measured)
    if way.days_left is not None and way.days_left < _FEW_DAYS:
        yield advice(f"the certificate of {host} ends in {way.days_left:.0f} days", "renew it", days=way.days_left)
    yield from _skew(host, way.skew_s)


def _skew(host: str, skew_s: float | None) -> Iterator[Finding]:
    if skew_s is None or abs(skew_s) < _SKEW_ADVICE_S:
        return
    told = f"this clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} that of {host}"
    mend = "timedatectl set-ntp true   (in a virtual machine or container: on its host)"
    if abs(skew_s) > _SKEW_REFUSED_S:
        yield problem(f"{told}: S3 refuses what is signed more than 15 minutes off", mend, skew_s=skew_s)
    else:
        yield advice(f"{told}; from 15 minutes on S3 refuses", mend, skew_s=skew_s)


def _integrity(place: Place, checksums: list[str], sample: str) -> Iterator[Finding]:
    """By what a first pull would be checked."""
    if checksums:
        yield ok(f"{place.uri}: {sample} has {', '.join(checksums)}: pulls are checked by the origin's own checksum")
    elif place.has_digests:
        yield ok(f"{place.uri}: no checksums there; the SHA-256 is known from elsewhere")
    else:
        told = f"{place.uri}: {sample} has no checksum: the first pull is believed as it comes (first-seen)"
        yield advice(told, "cached push DIR URI   (uploads with checksums; or write sha256 into the catalog)")


def _prefixed(place: Place, finding: Finding) -> Finding:
    return Finding(finding.verdict, f"{_named(place)}: {finding.told}", finding.measured, finding.mend)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _s3(place: Place) -> Iterator[Finding]:
    from cached.origins.s3.probe import facts_of, probe

    parsed = s3_options(place.spec)
    known = facts_of(place.spec)
    way = _follow(known.endpoint_url, known.ca_file, "CACHED_S3_CA_BUNDLE")
    if isinstance(way, Finding):
        yield _prefixed(place, way)
        return
    yield from _of_the_way(place, known.endpoint_url, way)
    facts = probe(place.spec)
    signed = "unsigned" if parsed.anonymous else f"credentials from {facts.credentials}"
    style = "in the path" if facts.addressing == "path" else "in the host name"
    if facts.error is not None:
        yield _refused(place, facts.error, facts)
    else:
        times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in facts.times_ms.items())
        measured = {f"{name}_ms": ms for name, ms in facts.times_ms.items()}
        if facts.skew_s is not None:
            measured["skew_s"] = facts.skew_s
        told = f"{_named(place)}: {times}; {signed}; region {facts.region or 'none'}, bucket {style}"
        yield ok(told, **measured)
        yield from _integrity(place, list(facts.checksums), facts.sample)
    if facts.honours_if_match is False:
        yield ok(f"{place.uri}: the server ignores If-Match; the version of every answer is compared instead")
    if facts.bucket_region and facts.region and facts.bucket_region != facts.region and facts.error is None:
        told = f"{place.uri}: the bucket is in {facts.bucket_region}, requests are first signed for {facts.region}"
        yield advice(told, f"CACHED_S3_REGION={facts.bucket_region}")
    yield from _credentials_end(facts.temporary, facts.ends_s, place.uri)


def _credentials_end(temporary: bool, ends_s: float | None, uri: str) -> Iterator[Finding]:
    if ends_s is not None and ends_s - time.time() < _SOON_S:
        left_s = ends_s - time.time()
        told = f"{uri}: the credentials end in {left_s:.0f} s, and have not been renewed"
        yield advice(told, "look at what renews them: aws sts get-caller-identity", left_s=left_s)
    elif temporary and ends_s is None:
        told = f"{uri}: the credentials are temporary (a session token), and nobody says until when"
        yield advice(told, "use a role, or a profile that renews itself; a daemon lives longer than a session token")


_KEYS = "write the pair of keys anew where they come from, without spaces around them"
_MENDS = {
    "SignatureDoesNotMatch": f"{_KEYS}: the secret key is not that of the access key",
    "InvalidAccessKeyId": f"{_KEYS}: this endpoint does not know the access key",
    "ExpiredToken": "renew the session token, or use a role",
    "InvalidToken": "renew the session token, or take it away: it is not one of this endpoint's",
    "AccessDenied": f"allow {_READ_ACTIONS}",
    "403": f"allow {_READ_ACTIONS}",
    "NoSuchBucket": "write the bucket's right name into the catalog, or CACHED_S3_ENDPOINT_URL of its store",
    "NoCredentialsError": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the daemon's environment (systemctl edit "
    "cached), a role, or for a public bucket CACHED_S3_ANONYMOUS=true",
    "RequestTimeTooSkewed": "timedatectl set-ntp true   (in a virtual machine or container: on its host)",
    "empty": "aws s3 ls --recursive the same URI   (look at bucket and prefix)",
}  # fmt: skip
_WRONG_REGION = frozenset({
    "301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
})  # fmt: skip


def _refused(place: Place, error: CachedError, facts: S3Facts) -> Finding:
    """The precise cause of a request that did not work."""
    code, skew_s, url = facts.code, facts.skew_s, facts.endpoint_url
    mend = _MENDS.get(code, error.hint)
    told = f"{_named(place)}: {facts.failed} failed: {error.message}"
    if code in _WRONG_REGION:
        mend = f"CACHED_S3_REGION={facts.bucket_region or 'the region that the message names'}"
    elif skew_s is not None and abs(skew_s) > _SKEW_REFUSED_S:
        told += f"; this clock is {abs(skew_s):.0f} s off"
        mend = _MENDS["RequestTimeTooSkewed"]
    elif code == "ConnectionClosedError" and url.startswith("http://"):
        mend = f"write https:// into the endpoint's URL, if it speaks TLS   (curl -v {url})"
    if code not in error.message and code != "empty":
        told += f" ({code})"
    return problem(told, mend)
