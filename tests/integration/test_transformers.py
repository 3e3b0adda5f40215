"""Models of transformers from a real daemon: the same outputs as a plain load, in the same memory for everybody."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
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


CASES = {
    "minilm": (engine_models.minilm, "AutoModel"),
    "llama": (engine_models.llama, "AutoModelForCausalLM"),
    "llama-tied": (lambda: engine_models.llama(tied=True), "AutoModelForCausalLM"),
    "llama-without-head": (engine_models.llama, "LlamaModel"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_a_plain_load_and_nothing_is_copied(site: Site, tmp_path: Path, case: str) -> None:
    make, auto_name = CASES[case]
    auto = getattr(transformers, auto_name)
    files = site.add("m", make())
    site.start()
    with site.cache() as cache:
        module = from_cache(auto, "m", cache=cache, timeout_s=60)
        expected = plain(files, tmp_path / "plain", auto)
        assert type(module) is type(expected)
        assert torch.equal(outputs(module), outputs(expected))
        model = held_by(module)
        assert model is not None
        inside, total = shared(module, model)
        assert inside == total > 0
        assert private_bytes(site) == 0
        assert not [name for name, item in [*module.named_parameters(), *module.named_buffers()] if item.is_meta]
        assert {name for name, _ in module.named_buffers()} == {name for name, _ in expected.named_buffers()}
        assert module.training is False
        assert module.dtype == expected.dtype
        if hasattr(expected, "generation_config"):
            assert module.generation_config.to_dict() == expected.generation_config.to_dict()


def test_experts_that_transformers_stacks_are_right_and_all_else_is_shared(site: Site, tmp_path: Path) -> None:
    files = site.add("m", engine_models.qwen_moe())
    site.start()
    with site.cache() as cache:
        module = from_cache(transformers.AutoModelForCausalLM, "m", cache=cache, timeout_s=60)
        expected = plain(files, tmp_path / "plain", transformers.AutoModelForCausalLM)
        assert module.dtype == torch.bfloat16
        assert torch.equal(outputs(module), outputs(expected))
        inside, total = shared(module, held_by(module))
        own = [name for name, _ in module.named_parameters() if "mlp.experts" in name]
        assert total - inside in {0, len(own)}, "version 4 has each expert by itself"
        assert inside > total / 2


def test_another_dtype_is_cast_into_memory_of_its_own(site: Site, tmp_path: Path) -> None:
    files = site.add("m", engine_models.llama())
    site.start()
    with site.cache() as cache:
        module = from_cache(transformers.AutoModelForCausalLM, "m", cache=cache, dtype=torch.bfloat16, timeout_s=60)
        expected = plain(files, tmp_path / "plain", transformers.AutoModelForCausalLM).to(torch.bfloat16)
        assert module.dtype == torch.bfloat16
        assert torch.equal(module.lm_head.weight, expected.lm_head.weight)
        assert shared(module, held_by(module))[0] == 0
        assert private_bytes(site) == 0


def test_two_processes_worth_of_modules_have_one_copy_and_one_download(site: Site) -> None:
    site.add("m", engine_models.llama())
    site.start()
    with site.cache() as cache:
        modules = [from_cache(transformers.AutoModelForCausalLM, "m", cache=cache, timeout_s=60) for _ in range(3)]
        assert len(site.leases()) == 3
        assert len(site.proxy.gets("model-00001")) == 1
        with torch.no_grad():
            modules[0].lm_head.weight.zero_()
        assert torch.count_nonzero(modules[1].lm_head.weight), "a write stays its module's own"
        del modules[0]
        wait_for(lambda: len(site.leases()) == 2, "the lease of the module that is gone to end")


def test_the_lease_lives_as_long_as_the_module(site: Site) -> None:
    site.add("m", engine_models.llama())
    site.start()
    module = from_cache(transformers.AutoModel, "m", cache=site.cache(), timeout_s=60, client_name="my worker")
    [lease] = site.leases()
    assert lease.client_name == "my worker"
    gc.collect()
    assert len(site.leases()) == 1
    kept, before = module.layers[0].mlp.up_proj.weight, module.layers[0].mlp.up_proj.weight.clone()
    del module
    gc.collect()
    wait_for(lambda: not site.leases(), "the lease to end")
    site.evict("m")
    assert torch.equal(kept, before), "what is still used stays"


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


def test_by_default_the_process_has_one_connection(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("m", engine_models.llama())
    site.start()
    monkeypatch.setenv("CACHED_SOCKET", str(site.daemon.socket))
    module = from_cache(transformers.AutoModel, "m", timeout_s=60)
    before = outputs(module)
    cached_client.suspend(timeout_s=60)
    assert not site.leases()
    site.evict("m")
    cached_client.resume(60)
    assert torch.equal(outputs(module), before), "the same module works again"
    del module, before
    gc.collect()
    wait_for(lambda: not site.leases(), "the lease to end")


def test_what_is_not_supported_is_refused_by_name(site: Site) -> None:
    files = engine_models.llama()
    config = json.loads(files["config.json"])

    def variant(**entries: Any) -> dict[str, bytes]:
        return {**files, "config.json": json.dumps({**config, **entries}).encode()}

    site.add("m", files)
    site.add("quantised", variant(quantization_config={"quant_method": "gptq", "bits": 4}))
    site.add("bin", {"config.json": files["config.json"], "pytorch_model.bin": b"x" * 1000})
    site.add("bare", {WEIGHTS: engine_models.minilm()[WEIGHTS]})
    site.start()
    auto = transformers.AutoModelForCausalLM
    with site.cache() as cache:
        refusals: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
            (InvalidRequestError, "gptq", "quantised", {}),
            (FormatError, "no safetensors", "bin", {}),
            (FormatError, r"no config\.json", "bare", {}),
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


def test_a_model_that_fails_its_check_is_not_built(site: Site) -> None:
    site.add("m", engine_models.qwen_moe(), sha256={WEIGHTS: "0" * 64})
    site.start()
    with site.cache() as cache, pytest.raises(cached_client.IntegrityError):
        from_cache(transformers.AutoModelForCausalLM, "m", cache=cache, timeout_s=60)


@pytest.mark.parametrize(("found", "match"), [(None, "needs transformers"), ("4.40.2", "not supported"), ("6.0.0", "<6")])
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


def test_the_published_shards_hold_what_the_plain_load_reads(tmp_path: Path) -> None:
    """The tied model's files lack the head, and the untied one's are several: or the cases above show less."""
    tied = written(tmp_path / "a", engine_models.llama(tied=True))
    names = {name for path in tied.glob("*.safetensors") for name in load_file(path)}
    assert "lm_head.weight" not in names
    assert len([path for path in engine_models.llama() if path.endswith(".safetensors")]) > 1
