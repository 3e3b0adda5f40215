"""Who may know of which model, kept true as the catalog changes: for the edges, and for what anybody can read."""

from __future__ import annotations

from collections.abc import Iterable

from cached.access import AccessList, AccessPolicy
from cached.cache.artifacts import Artifacts
from cached.cache.services import Services
from cached.catalog_file import Catalog
from cached.config import AccessConfig, L1Config
from cached.errors import ConfigError
from cached.refs import artifact_digest


class Visibility:
    """Loop only. ``policy`` is asked; this tells it what the catalog says."""

    def __init__(self, services: Services, artifacts: Artifacts, policy: AccessPolicy, l1: L1Config) -> None:
        self.policy = policy
        self._services = services
        self._artifacts = artifacts
        self._segment_mode = l1.segment_mode
        policy.list_of_artifact = self._list_of_artifact

    def check(self, catalog: Catalog) -> None:
        """Raises ConfigError for lists that files readable by a group would make nothing of."""
        listed = [f"models.{item.name}" for item in catalog.models.values() if item.access is not None]
        listed += [f"tenants.{name}" for name in catalog.access]
        if listed and self._is_shared:
            raise ConfigError(
                f"{listed[0]}.access cannot be kept: l1.segment_mode = {self._segment_mode!r} lets every member of "
                "l1.segment_group read every model in memory",
                hint='set l1.segment_mode = "0600" (workers get descriptors), or take the lists out of the catalog',
                key=f"{listed[0]}.access",
                value=self._segment_mode,
            )

    def refresh(self) -> None:
        """What the catalog said counts from now on. Raises LevelError if the directory view cannot be closed."""
        services, policy = self._services, self.policy
        policy.set_lists(services.registry.access())
        services.metrics.withhold_models(lambda name: not self.is_public(name))
        services.view.keep_private(private=policy.has_lists and not self._is_shared)

    def is_known(self, name: str) -> bool:
        """Whether there is such a model, whoever may know."""
        return name in self._services.registry.models

    def names(self) -> Iterable[str]:
        """Of all models, whoever may know."""
        return self._services.registry.models.keys()

    def is_public(self, name: str) -> bool:
        """Whether a model may be told of where nobody knows who reads: in the metrics, on the status page."""
        return not self.policy.is_listed(name)

    @property
    def _is_shared(self) -> bool:
        return bool(int(self._segment_mode, 8) & 0o077)

    def _list_of_artifact(self, name: str) -> AccessList | None:
        """Of what it was compiled for. What nobody can tell of yet is for operators, where anything is restricted."""
        if not artifact_digest(name):
            return None
        model = self._artifacts.model_of(name)
        if model:
            return self.policy.list_of(model)
        return AccessList() if self.policy.has_lists else None


def new_policy(config: AccessConfig) -> AccessPolicy:
    """As the settings say; nobody is named by lists that are empty."""
    named = AccessList(frozenset(config.operator_uids), frozenset(config.operator_gids))
    default = AccessList(frozenset(config.uids), frozenset(config.gids))
    return AccessPolicy(default if default.uids or default.gids else None, named if named.uids or named.gids else None)
