"""The code of the page for workers, run as it stands, with a real daemon and a real model."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch

import cached_client
from cached_client.integrations.transformers import held_by
from tests.docs.documents import blocks, section, text_of
from tests.integration import engine_models
from tests.integration.harness import wait_for
from tests.integration.support import Site

pytest.importorskip("transformers")


def test_the_code_of_the_page_runs_and_gives_what_it_says(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    site.add("all-minilm-l6-v2", engine_models.minilm())
    site.start()
    monkeypatch.setenv("CACHED_SOCKET", str(site.daemon.socket))
    page = text_of("docs/workers.md")

    def run(heading: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        [code] = blocks(section(page, heading), "python")
        exec(compile(code, f"docs/workers.md: {heading}", "exec"), names)
        return names

    told = run("transformers")
    assert told["hidden"].shape[-1] == 384
    assert told["seconds"] > 0
    model = held_by(told["encoder"])
    assert model is not None
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = run("A module of your own")["layer"]
    assert torch.equal(layer.weight, expected["encoder.layer.0.intermediate.dense.weight"])
    ranks = run("Slices for a rank")["ranks"]
    for name, dim in (("intermediate.dense.weight", 0), ("output.dense.weight", 1)):
        full = f"encoder.layer.3.{name}"
        assert torch.equal(torch.cat([rank[full] for rank in ranks], dim), expected[full])
        assert ranks[0][full].shape != expected[full].shape
    assert torch.equal(ranks[1]["pooler.dense.weight"], expected["pooler.dense.weight"])
    told_twice = run("Once per process")
    assert told_twice["first"].data_ptr() == told_twice["second"].data_ptr()
    weights = run("Around a snapshot of the process")["weights"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    del told, told_twice, model, layer, ranks, weights
    cached_client.unload()
    gc.collect()
    wait_for(lambda: not site.leases(), "every lease to end")
