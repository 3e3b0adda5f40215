"""The models that are always in L1, and whether there is room for one more among them."""

from __future__ import annotations

from collections.abc import Iterator

from cached.cache.registry import Model
from cached.cache.services import Services
from cached.errors import NoRoomError
from cached.policy.hot import check_hot
from cached.types import Tier


class HotSet:
    """Loop only. Asking for more hot bytes than ``l1.hot_capacity`` is an error; the catalog's excess is left out."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def sizes(self) -> dict[str, int]:
        """Bytes of each model that is hot, as far as they are known."""
        return {model.name: model.size_bytes for model in self.models()}

    @property
    def used_bytes(self) -> int:
        """Of all hot models together."""
        return sum(self.sizes().values())

    @property
    def capacity_bytes(self) -> int:
        """What they may take."""
        return self._services.storage.hot_capacity_bytes()

    def check(self, model: Model, needed_bytes: int = 0) -> None:
        """Raises NoRoomError, naming those that have the budget, if a model cannot be hot as well.

        ``needed_bytes``: its size, where that is not known from what is here.
        """
        check_hot(self.sizes(), model.name, needed_bytes or model.size_bytes, self.capacity_bytes)

    def has_room(self, model: Model) -> bool:
        """Whether a model could be hot as well."""
        try:
            self.check(model)
        except NoRoomError:
            return False
        return True

    def admitted(self) -> Iterator[Model]:
        """Those that fit, by priority and name. What the catalog has beyond the budget is told as degraded."""
        taken: dict[str, int] = {}
        problem = ""
        for model in sorted(self.models(), key=lambda model: (-model.priority, model.name)):
            try:
                check_hot(taken, model.name, model.size_bytes, self.capacity_bytes)
            except NoRoomError as error:
                problem = problem or error.message
                continue
            taken[model.name] = model.size_bytes
            yield model
        if problem:
            self._services.degraded.began("hot", problem)
        else:
            self._services.degraded.ended("hot")

    def models(self) -> Iterator[Model]:
        """Those that are hot now."""
        return (model for model in self._services.registry.models.values() if model.tier[0] is Tier.HOT)
