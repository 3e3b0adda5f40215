"""What an origin has now: where a model comes from, its objects there, the files chosen of them, and their revision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from cached.cache.absent import no_source
from cached.cache.artifact_key import Destination, choose, parse_archive
from cached.cache.asking import Asking, asked
from cached.cache.model import Model
from cached.cache.seeds import Seeds
from cached.errors import (
    InvalidRequestError,
    MoverError,
    NoSourceError,
    NotFoundError,
    OriginError,
    OriginUnavailableError,
)
from cached.manifest import Manifest, revision_of
from cached.origins.base import OriginObject, OriginSpec
from cached.origins.registry import check_scheme, pinned_spec
from cached.origins.selection import select
from cached.refs import Ref, artifact_digest, check_source, uris_of
from cached.seed import SeedRecord
from cached.signals import run_all
from cached.singleflight import SingleFlight
from cached.transfer.jobs import Listing, ListObjects, Prepare, StatObjects

_STATS_PER_JOB = 32


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the origin has now, chosen and ordered. ``source``: what it is remembered to be from.

    ``spec`` is of a chain whose authority said so. Where that was away it is of the rest of the chain.
    """

    spec: OriginSpec
    source: str
    items: tuple[OriginObject, ...]
    notes: tuple[str, ...]
    sha256: Mapping[str, str]
    revision: str


class Models(Protocol):
    """Which models are known; the registry is one."""

    def find(self, ref: Ref) -> Model | None:
        """The model of a reference, or None."""
        ...

    def known(self, name: str) -> Model:
        """The model of this name, made known if it is new."""
        ...

    def is_here(self, manifest: Manifest) -> bool:
        """True if every blob of a revision is at some local level, so that it needs no origin."""
        ...


class Resolving(Asking, Protocol):
    """What a resolver needs."""

    @property
    def registry(self) -> Models:
        """What is said of models."""
        ...


class Resolver:
    """Loop only. ``defaults``: for each scheme, the options that the configuration has for it."""

    def __init__(
        self,
        services: Resolving,
        defaults: Mapping[str, Mapping[str, str]],
        artifacts: Destination,
        seeds: Seeds | None = None,
    ) -> None:
        self._services = services
        self._seeds = seeds
        self._defaults = defaults
        self._artifacts = artifacts
        self._resolving: SingleFlight[tuple[str, str], Resolved] = SingleFlight()

    async def close(self) -> None:
        """Ends what is being resolved."""
        await self._resolving.close()

    def model_of(self, ref: Ref, source: str) -> Model:
        """The model, known from now on. Raises if nothing, or more than one, says where it comes from."""
        check_source(ref, source)
        model = self._services.registry.find(ref)
        if artifact_digest(ref.name):
            return self._artifact(ref, source or ref.uri, model)
        if not (source or ref.uri or (model and model.source)):
            raise no_source(ref)
        catalogued = model is not None and model.catalog is not None
        if catalogued and source and model is not None and source != model.source:
            raise InvalidRequestError(
                f"the catalog says that {ref.name} comes from {model.source}, not from {source}",
                hint="leave --source away, use another name, or change the catalog",
                value=source,
            )
        return self._services.registry.known(ref.name)

    def _artifact(self, ref: Ref, source: str, model: Model | None) -> Model:
        """A compile artifact is code that workers run: it comes from nowhere but the configured destination."""
        known = self._artifacts.source_of(ref.name) or (model.source if model else "")
        if source and source != known:
            raise InvalidRequestError(
                f"{ref.name} is the name of a compile artifact, which does not come from {source}",
                hint="call the model something else; artifacts come from artifacts.destination alone",
                value=source,
            )
        if not known:
            raise NoSourceError(
                f"the compile artifact {ref.name} is not on this host, and there is no destination to look at",
                hint="set artifacts.destination of the daemon, or save it here",
                ref=str(ref),
            )
        return self._services.registry.known(ref.name)

    def spec_of(self, uri: str) -> OriginSpec:
        """An origin that no model is from, with the options of the configuration."""
        return OriginSpec(uri, self._options(uri))

    def spec(self, model: Model, source: str, remembered: Mapping[str, str] | None = None) -> OriginSpec:
        """Where a model comes from: ``source``, else what the catalog or its record says.

        ``remembered``: the options that a revision of ``source`` came with, for a model that the catalog names no more.
        The links in front of what the catalog names are those that it names now, whenever the model came.
        """
        *front, uri = uris_of(source or model.source)
        catalog = model.catalog
        if catalog is not None:
            own = catalog.origin
        else:
            own = model.record.origin_options if remembered is None else remembered
        options = self._options(uri) | dict(own)
        if catalog is not None and uri == catalog.source:
            return OriginSpec(uri, options, tuple(self._link(item.source, item.origin) for item in catalog.front))
        return OriginSpec(uri, options, tuple(self._link(item, {}) for item in front))

    def own_options(self, spec: OriginSpec) -> dict[str, str]:
        """Those of its options that are not the configuration's."""
        defaults = self._options(spec.uri)
        return {name: value for name, value in spec.options.items() if defaults.get(name) != value}

    def _link(self, uri: str, options: Mapping[str, str]) -> OriginSpec:
        check_scheme(uri)
        return OriginSpec(uri, self._options(uri) | dict(options))

    def _options(self, uri: str) -> dict[str, str]:
        return dict(self._defaults.get(uri.partition("://")[0].lower(), {}))

    async def resolve(self, model: Model, source: str) -> Resolved:
        """What the origin has now; asked once for all who ask at the same time."""
        spec = self.spec(model, source or self._artifacts.source_of(model.name))
        return await self._resolving.do((model.name, spec.uri), lambda: self._look_or_seed(model, spec))

    async def _look_or_seed(self, model: Model, spec: OriginSpec) -> Resolved:
        """Where the catalog says the SHA-256 of all that a seed has, there is nothing to ask; else the origin first.

        No seed is asked for a compile artifact: that comes from the configured destination alone.
        """
        seeds = None if artifact_digest(model.name) else self._seeds
        seed = await seeds.of(model.name) if seeds is not None else None
        if seeds is None or seed is None:
            return await self._look_along(model, spec)
        digests = {entry.path: entry.digest for entry in seed.manifest.files}
        if model.catalog is not None and dict(model.catalog.sha256) == digests:
            seeds.used(model.name, "the catalog says what its files are")
            return _of_seed(model, spec, seed)
        try:
            return await self._look_along(model, spec)
        except OriginUnavailableError as error:
            if seed.manifest.source != spec.uri:
                raise
            seeds.used(model.name, error.message)
            return _of_seed(model, spec, seed)

    async def _look_along(self, model: Model, chain: OriginSpec) -> Resolved:
        """The authority's word. While it cannot be reached, that of the first link which answers; it vouches for less.

        An authority that refuses, or says that there is nothing, has been reached.
        """
        if not (model.current and self._services.registry.is_here(model.current)):
            self._services.runner.prepare(Prepare(chain))
        try:
            return await self._look(model, chain, _remembered(model, chain))
        except OriginUnavailableError as error:
            away = error
        failures: list[str] = []
        for link in chain.front:
            rest = replace(link, front=tuple(other for other in chain.front if other is not link))
            try:
                found = await self._look(model, rest, _remembered(model, chain), vouches=False)
            except (OriginError, NotFoundError) as error:
                failures.append(f"{link.uri} ({error.message})")
                continue
            note = f"listed by {link.uri}, whose checksums do not count, since its authority is away: {away.message}"
            return replace(found, notes=(*found.notes, note))
        if not failures:
            raise away
        raise OriginUnavailableError(
            f"none of the {len(chain.links)} origins answers: {'; '.join(failures)}; {chain.uri} ({away.message})",
            hint=away.hint, **away.fields,
        )  # fmt: skip

    async def _look(self, model: Model, spec: OriginSpec, source: str, *, vouches: bool = True) -> Resolved:
        """``vouches``: what it says of its content counts; that of a cache is only what it holds itself."""
        catalog = model.catalog
        listing = await self.listed(ListObjects(spec))
        if artifact_digest(model.name):
            return await self._chosen_artifact(model, spec, listing)
        chosen = select(
            listing,
            include=catalog.include if catalog else (),
            exclude=catalog.exclude if catalog else (),
            weights_format=(catalog.format if catalog else "") or "auto",
            source=spec.uri,
        )
        items = await self._stat(pinned_spec(spec, chosen.files), tuple(item.path for item in chosen.files))
        if not vouches:
            items = tuple(replace(item, checksums=()) for item in items)
        sha256 = dict(catalog.sha256) if catalog else {}
        missing = sorted(set(sha256) - {item.path for item in items})
        if missing:
            raise InvalidRequestError(
                f"the catalog has a sha256 for {missing[0]}, which {spec.uri} lacks or its patterns leave out",
                hint="correct the path in the catalog's sha256 table",
                value=missing[0],
            )
        return Resolved(
            spec=spec,
            source=source,
            items=items,
            notes=chosen.notes,
            sha256=sha256,
            revision=revision_of((item.path, item.size_bytes, _identity(item, sha256)) for item in items),
        )

    async def _chosen_artifact(self, model: Model, spec: OriginSpec, listing: tuple[OriginObject, ...]) -> Resolved:
        """Its objects are named by what they must hold, which counts as the catalog's word does."""
        key, archive = choose(model.name, listing, self._artifacts.max_bytes)
        parsed = parse_archive(archive.path)
        assert parsed is not None  # noqa: S101 - chosen by it
        sha256 = {key.path: artifact_digest(model.name), archive.path: parsed.sha256}
        items = await self._stat(spec, (key.path, archive.path))
        revision = revision_of((item.path, item.size_bytes, _identity(item, sha256)) for item in items)
        return Resolved(spec=spec, source=spec.uri, items=items, notes=(), sha256=sha256, revision=revision)

    async def _stat(self, spec: OriginSpec, paths: tuple[str, ...]) -> tuple[OriginObject, ...]:
        """Of a model of many files, by several movers beside each other."""
        found: dict[int, tuple[OriginObject, ...]] = {}

        async def some(at: int) -> None:
            found[at] = await self.listed(StatObjects(spec, paths[at : at + _STATS_PER_JOB]))

        await run_all(*(some(at) for at in range(0, len(paths), _STATS_PER_JOB)))
        return tuple(item for at in sorted(found) for item in found[at])

    async def listed(self, job: ListObjects | StatObjects) -> tuple[OriginObject, ...]:
        """Runs a listing job, with the retries that every request to an origin has."""
        answer = await asked(self._services, job)
        if not isinstance(answer, Listing):
            raise MoverError("a mover answered a listing with something else")
        return answer.items


def _remembered(model: Model, chain: OriginSpec) -> str:
    """What the catalog has in front of a source is looked up there; of any other chain all links are remembered."""
    return chain.uri if model.catalog is not None else " ".join(link.uri for link in chain.links)


def _of_seed(model: Model, spec: OriginSpec, seed: SeedRecord) -> Resolved:
    """What the origin had when the seed was laid."""
    sha256 = dict(model.catalog.sha256) if model.catalog else {}
    items = tuple(OriginObject(entry.path, entry.size_bytes, entry.version) for entry in seed.manifest.files)
    revision = revision_of((item.path, item.size_bytes, _identity(item, sha256)) for item in items)
    return Resolved(
        spec=spec, source=_remembered(model, spec), items=items, notes=seed.manifest.notes, sha256=sha256,
        revision=revision,
    )  # fmt: skip


def check_revision(ref: Ref, resolved: Resolved) -> None:
    """Raises NoSourceError unless the origin has the revision that was asked for, if one was."""
    if ref.revision and not resolved.revision.startswith(ref.revision):
        raise NoSourceError(
            f"{ref} is not here, and its origin has revision {resolved.revision} now",
            hint=f"pull {ref.name} without a revision to get what the origin has",
            ref=str(ref),
        )


def _identity(item: OriginObject, sha256: Mapping[str, str]) -> str:
    digest = sha256.get(item.path) or vouched_sha256(item)
    return f"sha256:{digest}" if digest else f"version:{item.version}"


def vouched_sha256(item: OriginObject) -> str:
    """The SHA-256 of the whole content, if the origin tells it."""
    whole = (check for check in item.checksums if check.algorithm == "sha256" and not check.part_sizes_bytes)
    return next((check.value_hex for check in whole), "")
