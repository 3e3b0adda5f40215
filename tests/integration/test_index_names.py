"""Names in a model's own index are those of its files, or nothing: no file is looked for by them anywhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cached_client
from tests.integration.part_support import INDEX, content, tensor_file
from tests.integration.support import Site

OURS = {"a.weight": 1000}
THEIRS = {"b.weight": 2000}


def hostile_names(outside: Path) -> dict[str, str]:
    return {
        "above": "../other/b.safetensors",
        "far-above": "../" * 20 + str(outside).lstrip("/"),
        "absolute": str(outside),
        "url": f"file://{outside}",
        "nul": "b.safetensors\0.txt",
        "escaped": "%2e%2e/other/b.safetensors",
        "lookalike": "．．/other/b.safetensors",
        "decomposed": "é.safetensors",
        "backslash": "..\\other\\b.safetensors",
        "surrogate": "\ud800.safetensors",
        "empty": "",
        "dots": "./b.safetensors",
        "long": "x" * 4096 + ".safetensors",
    }


@pytest.mark.parametrize("beside", [True, False], ids=["beside-a-true-name", "alone"])
def test_names_in_an_index_that_lead_out_of_the_model_are_refused_or_mean_nothing(
    site: Site, tmp_path: Path, beside: bool
) -> None:
    outside = tmp_path / "b.safetensors"
    outside.write_bytes(tensor_file(THEIRS, 9))
    site.add("other", {"b.safetensors": tensor_file(THEIRS, 8)})
    names = hostile_names(outside)
    for model, name in names.items():
        weight_map = {"b.weight": name} | ({"a.weight": "a.safetensors"} if beside else {})
        index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        site.add(model, {"a.safetensors": tensor_file(OURS, 1), INDEX: index})
    site.start()
    with site.cache() as cache:
        for model, name in names.items():
            files = site.files[model]
            with pytest.raises(cached_client.CacheError) as caught:
                cache.attach(model, only=["b.weight"], wait=True, timeout_s=60)
            assert caught.value.reason in {"NOT_FOUND", "BAD_FORMAT"}, f"{model}: {caught.value!r}"
            with cache.attach(model, only=["a.weight"], wait=True, timeout_s=60) as part:
                assert bytes(part.raw("a.weight", 60)) == content(files, "a.weight")
            with cache.attach(model, wait=True, timeout_s=60) as whole:
                assert set(whole.files) == set(files)
                if not beside:
                    assert whole.names() == ["a.weight"], "as if there were no index"
                    continue
                with pytest.raises(cached_client.FormatError) as refusal:
                    whole.names()
                assert repr(name)[:100] in refusal.value.message
    assert not site.proxy.requests(path="other/")
