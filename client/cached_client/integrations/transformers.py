"""Models of transformers from the cache: their parameters lie in the host's shared memory.

::

    from transformers import AutoModelForCausalLM
    from cached_client.integrations.transformers import from_cache, tokenizer_from_cache

    model = from_cache(AutoModelForCausalLM, "qwen2-7b")
    tokenizer = tokenizer_from_cache("qwen2-7b")

transformers itself builds the model, through what it documents: ``from_pretrained`` with a configuration and a state
dict in place of a name. So tied weights, buffers, prefixes of heads and conversions of older checkpoints are its own
work. Needs transformers 4.51 or newer, below 6; it is imported with the first call.
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import contextmanager
from functools import cache as remembered
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cached_client._arrivals import Deadline
from cached_client._process import shared_cache
from cached_client.attach import Model
from cached_client.cache import Cache
from cached_client.errors import FormatError, InvalidRequestError
from cached_client.gpu.load import parse_device
from cached_client.patterns import ANY_WEIGHTS_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

OLDEST, TOO_NEW = (4, 51), (6,)

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_ELSEWHERE = {
    "state_dict": "the cache gives it",
    "gguf_file": "a GGUF file is not read through this path",
    "quantization_config": "quantising while loading is not supported",
    "device_map": "pass device, a single one",
    "tp_plan": "use the directory, or load_into with slices",
    "distributed_config": "use the directory, or load_into with slices",
    "subfolder": "the model's own top is read",
    "variant": "choose files with include patterns in the catalog",
    "adapter_kwargs": "load the adapter afterwards",
}
"""Arguments of ``from_pretrained`` that cannot mean here what they mean there, and what to do."""

_HELD: weakref.WeakKeyDictionary[torch.nn.Module, Model] = weakref.WeakKeyDictionary()
"""The attached model of each module: as long as the module is there, it has a lease."""


def from_cache(
    auto_class: Any,
    name: str | Model,
    *,
    cache: Cache | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    timeout_s: float | None = None,
    **options: Any,
) -> Any:
    """What ``auto_class.from_pretrained(name, dtype=…)`` gives, with the weights from the cache.

    ``auto_class`` is one of the Auto classes or a model's own class. ``name`` is a REF of the cache (pulled if needed),
    or a `Model` that was attached already. Without ``cache`` the process's own connection is used (that of
    `cached_client.load`).

    On the CPU no weight is copied: parameters are windows on shared memory, copy-on-write, unless transformers has to
    make other bytes of them: another ``dtype`` than the checkpoint's (None: that of the configuration, else of the
    weights), or weights that it stores in another form than the file does (the experts of a mixture, in version 5).
    With ``device`` the weights cross to it while they download; that needs the package accelerate.

    ``options`` that `Cache.attach` knows (``source``, ``keep_alive_s``, ``client_name``, …) go there, all others to
    ``from_pretrained``: settings of the configuration, ``attn_implementation``, ``output_loading_info`` and so on.

    The lease ends when the module is gone; see `held_by`. Raises ImportError without transformers, or with a version
    that is not supported; InvalidRequestError for what cannot be had this way (quantised models, code from the model's
    repository, ``device_map``, …), FormatError for a model without safetensors, and what `Cache.attach` does.
    """
    transformers = _transformers()
    attach_options, options = _divided(options)
    _check_options(options)
    target = parse_device(device)
    if target is not None:
        _accelerate()
    deadline = Deadline(timeout_s)
    model, ours = _attached(name, cache, deadline, attach_options)
    try:
        with small_files(model, (_CONFIG, _GENERATION_CONFIG), deadline.left_s()) as folder:
            config, rest = _configured(auto_class, folder, model, dtype, options)
            kind = _model_class(auto_class, config)
            if (folder / _GENERATION_CONFIG).is_file():
                rest.setdefault("generation_config", transformers.GenerationConfig.from_pretrained(folder))
        _check_weights(model, deadline)
        state = model.state_dict(target, deadline.left_s())
        placed = {} if target is None else {"device_map": {"": target}}
        loaded = kind.from_pretrained(None, config=_sub_config(kind, config), state_dict=state, **placed, **rest)
    except BaseException:
        if ours:
            model.close()
        raise
    module = loaded[0] if isinstance(loaded, tuple) else loaded
    module.config._name_or_path = module.name_or_path = model.name  # noqa: SLF001 as from_pretrained leaves them
    _HELD[module] = model
    return loaded


def tokenizer_from_cache(
    name: str | Model,
    *,
    cache: Cache | None = None,
    tokenizer_class: Any = None,
    timeout_s: float | None = None,
    **options: Any,
) -> Any:
    """``AutoTokenizer.from_pretrained`` (or another class's: a processor, a feature extractor) from a cached model.

    Its files are small, arrive first, and are read from a private copy, so that this does not wait for weights and
    needs no sight of the daemon's directory. Nothing holds the model afterwards. ``options`` are divided, and errors
    are, as in `from_cache`.
    """
    transformers = _transformers()
    attach_options, options = _divided(options)
    deadline = Deadline(timeout_s)
    model, ours = _attached(name, cache, deadline, attach_options)
    try:
        with small_files(model, None, deadline.left_s()) as folder:
            return (tokenizer_class or transformers.AutoTokenizer).from_pretrained(folder, **options)
    finally:
        if ours:
            model.close()


def held_by(module: torch.nn.Module) -> Model | None:
    """The attached model whose weights a module of `from_cache` uses: its timings, its lease, `Model.suspend`."""
    return _HELD.get(module)


@contextmanager
def small_files(model: Model, names: tuple[str, ...] | None, timeout_s: float | None = None) -> Iterator[Path]:
    """A temporary folder of copies of some of the model's files, or of all that are no weights.

    Waits only for these files, which arrive before the weights. Names that the model does not have are left out.
    """
    deadline = Deadline(timeout_s)
    with TemporaryDirectory(prefix="cached-") as made:
        folder = Path(made)
        for path in model.files:
            wanted = path in names if names is not None else not path.endswith(ANY_WEIGHTS_SUFFIX)
            if wanted:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(model.read(path, deadline.left_s()))
        yield folder


@remembered
def _transformers() -> Any:
    wanted = f"transformers>={'.'.join(map(str, OLDEST))},<{TOO_NEW[0]}"
    try:
        found = import_module("transformers")
    except ImportError as error:
        raise ImportError(f"this needs transformers: pip install '{wanted}'") from error
    version = tuple(int(part) for part in found.__version__.split(".")[:2] if part.isdigit())
    if not OLDEST <= version < TOO_NEW:
        raise ImportError(f"transformers {found.__version__} is not supported here: pip install '{wanted}'")
    return found


def _accelerate() -> None:
    try:
        import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            "transformers needs accelerate to place a model on a device: pip install accelerate, or leave device away "
            "and move the model with .to(device)"
        ) from error


def _divided(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is meant for `Cache.attach`, and the rest."""
    known = {*inspect.signature(Cache.attach).parameters} - {"self", "ref", "timeout_s"}
    theirs = {key: value for key, value in options.items() if key in known}
    return theirs, {key: value for key, value in options.items() if key not in known}


def _check_options(options: dict[str, Any]) -> None:
    for key, hint in _ELSEWHERE.items():
        if options.get(key) is not None:
            raise InvalidRequestError(f"from_cache does not take {key}", hint=hint, value=key)
    if options.pop("trust_remote_code", False):
        raise InvalidRequestError(
            "from_cache runs no code from a model's repository",
            hint="use from_pretrained(model.directory, trust_remote_code=True) with an attached model",
            value="trust_remote_code",
        )


def _check_weights(model: Model, deadline: Deadline) -> None:
    if not model.names(deadline.left_s()):
        raise FormatError(
            f"{model.name} has no safetensors files",
            hint="`cached convert` makes safetensors of .bin files, which are code and are not loaded",
            path="*.safetensors",
        )


def _attached(
    name: str | Model, cache: Cache | None, deadline: Deadline, options: dict[str, Any]
) -> tuple[Model, bool]:
    """The model, and whether it was attached here."""
    if not isinstance(name, Model):
        return (cache or shared_cache()).attach(name, timeout_s=deadline.left_s(), **options), True
    if options or cache is not None:
        given = ", ".join([*options, *(["cache"] if cache else [])])
        raise InvalidRequestError(f"{name.name} is attached already: {given} is of no use", value=given)
    return name, False


def _configured(
    auto_class: Any, folder: Path, model: Model, dtype: torch.dtype | str | None, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration with the settings among ``options``, and what else ``from_pretrained`` is to have."""
    transformers = _transformers()
    if not (folder / _CONFIG).is_file():
        raise FormatError(
            f"{model.name} has no {_CONFIG}, by which transformers knows models",
            hint="use Model.load_into with a module of your own",
            path=_CONFIG,
        )
    reader = transformers.AutoConfig if hasattr(auto_class, "_model_mapping") else auto_class.config_class
    own = {} if reader is not transformers.AutoConfig else {"trust_remote_code": False}
    config, rest = reader.from_pretrained(folder, return_unused_kwargs=True, **own, **options)
    rest.pop("trust_remote_code", None)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise InvalidRequestError(
            f"{model.name} is quantised ({method}), which from_cache does not load",
            hint="use from_pretrained(model.directory) with an attached model: its files are the cached ones",
            value=method,
        )
    new_name = "dtype" if _version() >= (4, 56) else "torch_dtype"
    return config, rest | {new_name: "auto" if dtype is None else dtype}


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in _transformers().__version__.split(".")[:2] if part.isdigit())


def _model_class(auto_class: Any, config: Any) -> Any:
    """The model's own class; its code is imported now, while weights still arrive. Raises InvalidRequestError."""
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class
    kind = mapping.get(type(config), None)
    if isinstance(kind, (tuple, list)):
        named = {item.__name__: item for item in kind}
        kind = next((named[name] for name in config.architectures or () if name in named), kind[0])
    if kind is None:
        raise InvalidRequestError(
            f"{auto_class.__name__} has no model for {type(config).__name__}",
            hint="its class is code in the model's repository, or another Auto class is meant; for the former use "
            "from_pretrained(model.directory, trust_remote_code=True) with an attached model",
            value=type(config).__name__,
        )
    return kind


def _sub_config(kind: Any, config: Any) -> Any:
    """The part of a composite configuration that the class is made for, as the Auto classes choose it."""
    parts = getattr(config, "sub_configs", {})
    wanted = getattr(kind, "config_class", None)
    if not isinstance(config, wanted or object) and parts.get("text_config") is wanted:
        return config.get_text_config()
    return config
