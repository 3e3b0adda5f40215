"""Models of transformers from a real daemon: the same outputs as a plain load, in the same memory for everybody."""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import cached_client
from cached_client.errors import FormatError, InvalidRequestError
from cached_client.integrations import transformers as integration
from cached_client.integrations.transformers import from_cache, held_by, tokenizer_from_cache
from tests.integration import engine_models
from tests.integration.engine_models import IDS, written
from tests.integration.harness import wait_for
from tests.integration.support import Site

transformers = pytest.importorskip("transformers")
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def collected(site: Site) -> Iterator[None]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    gc.collect()


def plain(files: dict[str, bytes], folder: Path, auto: Any, **options: Any) -> Any:
    """What transformers makes of the same files without the cache."""
    return auto.from_pretrained(written(folder, files), **options)


def outputs(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=IDS)[0]


def shared(module: Any, model: cached_client.Model) -> tuple[int, int]:
    """How many of a module's parameters are tensors of the attached model where it is mapped, and how many it has."""
    mapped = {tensor.data_ptr() for tensor in model.state_dict().values()}
    inside = [item.data_ptr() in mapped for item in module.parameters()]
    return sum(inside), len(inside)


def private_bytes(site: Site) -> int:
    """What this process has of its own of the daemon's segments."""
    names = {str(path) for path in site.segments("blob")}
    maps = [item for item in psutil.Process().memory_maps(grouped=False) if item.path in names]
    assert maps, "segments are mapped"
    return sum(item.anonymous for item in maps)


CASES: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "minilm": (engine_models.minilm, "AutoModel"),
    "llama": (engine_models.llama, "AutoModelForCausalLM"),
    "llama-tied": (lambda: engine_models.llama(tied=True), "AutoModelForCausalLM"),
    "llama-without-head": (engine_models.llama, "LlamaModel"),
    "experts": (engine_models.qwen_moe, "AutoModelForCausalLM"),
}


def test_outputs_are_those_of_a_plain_load_and_nothing_is_copied(site: Site, tmp_path: Path) -> None:
    for case, (make, _) in CASES.items():
        site.add(case, make())
    site.start()
    with site.cache() as cache:
        for case, (make, auto_name) in CASES.items():
            auto = getattr(transformers, auto_name)
            module = from_cache(auto, case, cache=cache, timeout_s=60)
            check_like(module, plain(make(), tmp_path / case, auto))
            model = held_by(module)
            assert model is not None
            assert model.name == case
            inside, total = shared(module, model)
            # Version 5 of transformers stacks a layer's experts; version 4 has each by itself.
            own = sum("mlp.experts." in name for name, _ in module.named_parameters())
            assert (total - inside) in ({0, own} if case == "experts" else {0})
            assert inside > total / 2
        assert private_bytes(site) == 0


def check_like(module: Any, expected: Any) -> None:
    assert type(module) is type(expected)
    assert torch.equal(outputs(module), outputs(expected))
    assert not [name for name, item in [*module.named_parameters(), *module.named_buffers()] if item.is_meta]
    assert {name for name, _ in module.named_buffers()} == {name for name, _ in expected.named_buffers()}
    assert module.training is False
    assert module.dtype == expected.dtype
    if getattr(expected, "generation_config", None) is not None:
        assert module.generation_config.to_dict() == expected.generation_config.to_dict()


def test_modules_share_one_copy_and_one_download_and_a_cast_one_has_its_own(site: Site) -> None:
    site.add("m", engine_models.llama())
    site.start()
    auto = transformers.AutoModelForCausalLM
    with site.cache() as cache:
        modules = [from_cache(auto, "m", cache=cache, timeout_s=60) for _ in range(3)]
        assert len(site.leases()) == 3
        assert len(site.proxy.gets("model-00001")) == 1
        cast = from_cache(auto, "m", cache=cache, dtype=torch.bfloat16, timeout_s=60)
        assert cast.dtype == torch.bfloat16
        assert torch.equal(cast.lm_head.weight, modules[0].lm_head.weight.bfloat16())
        assert shared(cast, held_by(cast))[0] == 0
        assert private_bytes(site) == 0
        with torch.no_grad():
            modules[0].lm_head.weight.zero_()
        assert torch.count_nonzero(modules[1].lm_head.weight), "a write stays its module's own"
        assert private_bytes(site) > 0
        del modules[0]
        wait_for(lambda: len(site.leases()) == 3, "the lease of the module that is gone to end")
        check_device(cache)


def check_device(cache: cached_client.Cache) -> None:
    pytest.importorskip("accelerate")
    module = from_cache(transformers.AutoModelForCausalLM, "m", cache=cache, device="meta", timeout_s=60)
    assert {item.device.type for item in [*module.parameters(), *module.buffers()]} == {"meta"}
    model = held_by(module)
    assert model is not None
    assert model.device_report is not None
    assert model.device_report.device == "meta"


def test_everything_but_the_weights_is_done_while_they_download(site: Site) -> None:
    files = site.add("m", engine_models.minilm())
    site.start()
    held = site.hold(WEIGHTS, times=-1)
    with site.cache() as cache, cache.attach("m", timeout_s=60) as model:
        tokenizer = tokenizer_from_cache(model, timeout_s=60)
        assert tokenizer("one two")["input_ids"][0] == tokenizer.cls_token_id
        with integration.small_files(model, None, 60) as folder:
            assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
                path for path in files if not path.endswith((".safetensors", ".bin"))
            }
            assert not model.complete
        with pytest.raises(cached_client.TimeoutExpiredError):
            from_cache(transformers.AutoModel, model, timeout_s=0.3)
        held.release()
        module = from_cache(transformers.AutoModel, model, timeout_s=60)
        assert held_by(module) is model
        assert model.report is not None
        assert model.report.from_level == "l3"


def test_the_lease_lives_as_long_as_the_module_and_the_module_outlives_a_suspension(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("m", engine_models.llama())
    site.start()
    monkeypatch.setenv("CACHED_SOCKET", str(site.daemon.socket))
    module = from_cache(transformers.AutoModel, "m", timeout_s=60, client_name="my worker")
    [lease] = site.leases()
    assert lease.client_name == "my worker"
    before = outputs(module)
    cached_client.suspend(timeout_s=60)
    assert not site.leases()
    site.evict("m")
    cached_client.resume(60)
    assert torch.equal(outputs(module), before), "the same module works again"
    kept, weight = module.layers[0].mlp.up_proj.weight, module.layers[0].mlp.up_proj.weight.clone()
    del module, before
    gc.collect()
    wait_for(lambda: not site.leases(), "the lease to end")
    site.evict("m")
    assert torch.equal(kept, weight), "what is still used stays"


def test_what_is_not_supported_is_refused_by_name(site: Site) -> None:
    files = engine_models.llama()
    config = json.loads(files["config.json"])

    def variant(**entries: Any) -> dict[str, bytes]:
        return {**files, "config.json": json.dumps({**config, **entries}).encode()}

    site.add("m", files)
    site.add("quantised", variant(quantization_config={"quant_method": "gptq", "bits": 4}))
    site.add("bin", {"config.json": files["config.json"], "pytorch_model.bin": b"x" * 1000}, format="all")
    site.add("bare", {WEIGHTS: engine_models.qwen_moe()[WEIGHTS]})
    site.add("wrong", engine_models.qwen_moe(), sha256={WEIGHTS: "0" * 64})
    site.start()
    auto = transformers.AutoModelForCausalLM
    with site.cache() as cache:
        refusals: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
            (InvalidRequestError, "gptq", "quantised", {}),
            (FormatError, "no safetensors", "bin", {}),
            (FormatError, r"no config\.json", "bare", {}),
            (cached_client.IntegrityError, WEIGHTS, "wrong", {}),
            (InvalidRequestError, "device_map", "m", {"device_map": "auto"}),
            (InvalidRequestError, "no code", "m", {"trust_remote_code": True}),
            (InvalidRequestError, "torch knows no device", "m", {"device": "nowhere"}),
        ]
        for kind, match, name, options in refusals:
            with pytest.raises(kind, match=match):
                from_cache(auto, name, cache=cache, timeout_s=60, **options)
        with pytest.raises(InvalidRequestError, match="AutoModelForMaskedLM has no model for LlamaConfig"):
            from_cache(transformers.AutoModelForMaskedLM, "m", cache=cache, timeout_s=60)
    wait_for(lambda: not site.leases(), "refusals to leave no lease")


@pytest.mark.parametrize(
    ("found", "match"), [(None, "needs transformers"), ("4.40.2", "not supported"), ("6.0.0", "<6")]
)
def test_a_missing_or_foreign_transformers_is_told(
    monkeypatch: pytest.MonkeyPatch, found: str | None, match: str
) -> None:
    def imported(name: str) -> Any:
        if found is None:
            raise ImportError(name)
        return type("Fake", (), {"__version__": found})

    monkeypatch.setattr(integration, "import_module", imported)
    integration._transformers.cache_clear()
    with pytest.raises(ImportError, match=match):
        from_cache(None, "m")
    integration._transformers.cache_clear()


def test_a_device_needs_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        from_cache(transformers.AutoModel, "m", device="cuda:0")


def test_the_published_shards_hold_what_the_plain_load_reads(tmp_path: Path) -> None:
    """The tied model's files lack the head, and the untied one's are several: or the cases above show less."""
    tied = written(tmp_path / "a", engine_models.llama(tied=True))
    names = {name for path in tied.glob("*.safetensors") for name in load_file(path)}
    assert "lm_head.weight" not in names
    assert len([path for path in engine_models.llama() if path.endswith(".safetensors")]) > 1
