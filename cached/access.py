"""Who may see what: callers, access lists, and the one rule that joins them. Pure; standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, as the kernel or a certificate proves it and never as the caller says.

    ``name`` is for people and for what is counted by caller: ``uid 1001``. ``uid`` is -1, and ``gids`` are none, for
    who comes over a network. ``operator``: root, the daemon's own user, and whom the settings name.
    """

    name: str
    uid: int = -1
    gids: frozenset[int] = frozenset()
    operator: bool = False


@dataclass(frozen=True, slots=True)
class AccessList:
    """These users, and members of these groups. One that is empty lets in operators alone."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def __str__(self) -> str:
        ids = [f"uid {uid}" for uid in sorted(self.uids)] + [f"members of gid {gid}" for gid in sorted(self.gids)]
        return ", ".join([*ids, "operators"])

    def allows(self, caller: Caller) -> bool:
        """Whether the caller is on it, by user, group or supplementary group."""
        return caller.uid in self.uids or not self.gids.isdisjoint(caller.gids)


class AccessPolicy:
    """The rule. Of a model its own list counts, else its tenant's, else ``default``; None: everybody may see it.

    An operator sees everything, and alone may do what concerns all: evict, remove, set tiers, name sources. While
    nothing tells users apart (no operators are named, and no model has a list), whoever ``default`` lets in is one.
    """

    def __init__(self, default: AccessList | None = None, operators: AccessList | None = None) -> None:
        self._default = default
        self._operators = operators
        self._lists: Mapping[str, AccessList] = {}
        self.list_of_artifact: Callable[[str], AccessList | None] = lambda _name: None
        """The list that a compile artifact has by what it was compiled for; None: it has none."""

    def set_lists(self, lists: Mapping[str, AccessList]) -> None:
        """By model, those that have one of their own or by their tenant."""
        self._lists = lists

    @property
    def has_lists(self) -> bool:
        """Whether any model has one."""
        return bool(self._lists)

    def is_listed(self, name: str) -> bool:
        """Whether a model has a list by the catalog's word: then it is not told of where nobody knows who reads."""
        return name in self._lists or (self.has_lists and self.list_of_artifact(name) is not None)

    @property
    def is_open(self) -> bool:
        """Nothing is kept from anybody."""
        return not self._lists and self._operators is None and self._default is None

    def is_operator(self, caller: Caller) -> bool:
        """Whether the caller may do everything."""
        if caller.operator or (self._operators is not None and self._operators.allows(caller)):
            return True
        if self._operators is not None or self._lists:
            return False
        return self._default is None or self._default.allows(caller)

    def lets_in(self, caller: Caller) -> bool:
        """Whether there is anything for the caller to use here: else not even a question is answered."""
        if self._default is None or self._default.allows(caller) or self.is_operator(caller):
            return True
        return any(found.allows(caller) for found in self._lists.values())

    def may_see(self, caller: Caller, name: str) -> bool:
        """Whether a model of this name, if there is one, is there for the caller."""
        found = self.list_of(name)
        return found is None or found.allows(caller) or self.is_operator(caller)

    def list_of(self, name: str) -> AccessList | None:
        """The list that counts for a model of this name; None: everybody may see it."""
        return self._lists.get(name) or self.list_of_artifact(name) or self._default
