"""Tensors of a model into a ``torch.nn.Module``: names, tied parameters, and what may not stay on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

Rename = Mapping[str, str] | Callable[[str], str | None]
"""From a tensor's name in the model to that in the module: a mapping (what is not in it keeps its name), or a function;
None leaves a tensor out."""

_Place = tuple["torch.nn.Module", str]
"""A module, and the name of a parameter or buffer in it."""


def new_names(names: Iterable[str], rename: Rename) -> dict[str, str]:
    """Each wanted tensor's name in the module. Raises InvalidRequestError if two get the same."""
    chosen: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        new = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
        if new is None:
            continue
        if new in taken:
            raise InvalidRequestError(
                f"{taken[new]!r} and {name!r} would both be {new!r} of the module", hint="look at rename", value=new
            )
        chosen[name], taken[new] = new, name
    return chosen


def check_loadable(module: torch.nn.Module) -> None:
    """Raises InvalidRequestError for buffers on the meta device that no checkpoint holds."""
    lost = [
        name
        for name, place in _places(module, "_buffers")
        if _held(place, "_buffers").is_meta and place[1] in place[0]._non_persistent_buffers_set  # noqa: SLF001 no other way
    ]
    if lost:
        raise InvalidRequestError(
            f"the module has buffers on the meta device that are in no checkpoint: {', '.join(lost[:5])}",
            hint="compute them on a real device before, as the module's own __init__ does; for a model of transformers "
            "use cached_client.integrations.transformers.from_cache; or pass strict=False, and fill them afterwards",
            value=lost[0],
        )


def fill(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], *, strict: bool, dtype: torch.dtype | None = None
) -> Any:
    """Puts tensors into a module: by assignment if part of it is on the meta device, else by copying.

    Parameters that are one object in the module are so afterwards, and need only one of their names among the tensors.
    ``dtype`` is that of the floating-point tensors that are assigned. Returns torch's ``(missing_keys,
    unexpected_keys)``; raises its RuntimeError for a mismatch, and InvalidRequestError if the tensors of one tied
    parameter differ.
    """
    owned = [*module.parameters(), *module.buffers()]
    assign = any(tensor.is_meta for tensor in owned)
    if assign and dtype is not None:
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    groups = [group for table in ("_parameters", "_buffers") for group in _tied(module, table)]
    for group in groups:
        tensors = _complete(tensors, list(group))
    result = module.load_state_dict(tensors, strict=strict, assign=assign)
    for group in groups if assign else ():
        _tie(group)
    return result


def _complete(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors, with all names of a tied parameter if they have one of them."""
    import torch

    present = [name for name in names if name in tensors]
    if not present:
        return tensors
    first = tensors[present[0]]
    for name in present[1:]:
        if tensors[name].shape != first.shape or not torch.equal(tensors[name], first):
            raise InvalidRequestError(
                f"{present[0]!r} and {name!r} are one parameter of the module, and differ in the model",
                hint="build the module without tying them (in a configuration: tie_word_embeddings=False)",
                value=name,
            )
    return tensors | dict.fromkeys(names, first)


def _tied(module: torch.nn.Module, table: str) -> list[dict[str, _Place]]:
    """The parameters (or buffers) that have several names: the places by name."""
    groups: dict[int, dict[str, _Place]] = {}
    for name, place in _places(module, table):
        groups.setdefault(id(_held(place, table)), {})[name] = place
    return [group for group in groups.values() if len(group) > 1]


def _tie(group: dict[str, _Place]) -> None:
    (module, name), *others = group.values()
    for other, alias in others:
        setattr(other, alias, getattr(module, name))


def _places(module: torch.nn.Module, table: str) -> Iterator[tuple[str, _Place]]:
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, tensor in getattr(part, table).items():
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, (part, name)


def _held(place: _Place, table: str) -> torch.Tensor:
    module, name = place
    tensor: torch.Tensor = getattr(module, table)[name]
    return tensor
