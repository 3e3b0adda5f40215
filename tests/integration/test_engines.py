"""Any engine by a directory: unmodified programs read a model of the cache where it lies, in the host's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.integration import engine_models
from tests.integration.engine_models import IDS, written
from tests.integration.support import SERVE, Site

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# What every one of these programs prints at its end: where its pages are. None of them knows of the cache.
MAPPED = """
    segments = [part for part in open("/proc/self/smaps").read().split("VmFlags") if "/dev/shm/cached." in part]
    own = sum(int(line.split()[1]) for part in segments for line in part.splitlines() if line.startswith("Anonymous:"))
    print(json.dumps({"found": found, "segments": len(segments), "own_kib": own}))
"""
SAFETENSORS = """if True:
    import json, os, sys
    from safetensors import safe_open
    folder, found = sys.argv[1], {}
    assert folder == os.environ["CACHED_MODEL_PATH"]
    names = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    opened = [safe_open(os.path.join(folder, name), "np") for name in names]
    for file in opened:
        found |= {name: float(file.get_tensor(name).sum()) for name in file.keys()}
"""
TRANSFORMERS = """if True:
    import json, sys, torch, transformers
    ids, found, models = torch.tensor(json.loads(sys.argv[2])), {}, []
    for place, auto in zip([sys.argv[1], *sys.argv[4::2]], sys.argv[3::2]):
        models.append(getattr(transformers, auto).from_pretrained(place))
        with torch.inference_mode():
            found[place] = models[-1](input_ids=ids)[0].float().flatten().tolist()
"""
GGUF = """if True:
    import json, sys
    from gguf import GGUFReader
    reader = GGUFReader(sys.argv[1] + "/model.gguf")
    found = {tensor.name: float(tensor.data.astype("float64").sum()) for tensor in reader.tensors}
    found["arch"] = reader.get_field("general.architecture").contents()
"""


def run(site: Site, name: str, program: str, *arguments: str) -> dict[str, Any]:
    """What an unmodified program prints that ``cached run`` gives the model's directory to."""
    words = [*SERVE, "--socket", str(site.daemon.socket), "run", name, "--", sys.executable, "-c", program + MAPPED]
    ran = subprocess.run([*words, "{path}", *arguments], capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def gguf_file(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """A GGUF file as llama.cpp's own writer makes it, and its tensors."""
    generator = np.random.default_rng(4)
    tensors = {
        "token_embd.weight": generator.standard_normal((256, 64), np.float32),
        "blk.0.attn_q.weight": generator.standard_normal((64, 64), np.float32).astype(np.float16),
        "output_norm.weight": np.ones(64, np.float32),
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "model.gguf").read_bytes(), tensors


def test_safetensors_and_gguf_readers_map_the_segments_themselves(site: Site, tmp_path: Path) -> None:
    llama = engine_models.llama()
    data, tensors = gguf_file(tmp_path)
    site.add("llama", llama)
    site.add("gguf", {"model.gguf": data, "README.md": b"quantised by nobody"})
    site.start()
    told = run(site, "llama", SAFETENSORS)
    weights = {
        name: array for path in llama if path.endswith(".safetensors") for name, array in load(llama[path]).items()
    }
    assert told["found"].keys() == weights.keys()
    assert all(np.isclose(told["found"][name], array.sum(), rtol=1e-4, atol=1e-3) for name, array in weights.items())
    assert (told["segments"] > 0, told["own_kib"]) == (True, 0)
    told = run(site, "gguf", GGUF)
    assert told["found"].pop("arch") == "llama"
    assert told["found"] == {name: float(array.astype(np.float64).sum()) for name, array in tensors.items()}
    assert (told["segments"], told["own_kib"]) == (1, 0)


def test_transformers_computes_from_directories_what_it_computes_from_files(site: Site, tmp_path: Path) -> None:
    files = {"minilm": engine_models.minilm(), "llama": engine_models.llama(), "experts": engine_models.qwen_moe()}
    autos = {"minilm": "AutoModel", "llama": "AutoModelForCausalLM", "experts": "AutoModelForCausalLM"}
    for name, content in files.items():
        site.add(name, content)
    site.start()
    places = {}
    for name in files:
        site.pull(name)
        places[name] = site.describe(name).path
    # The first by `cached run`, the others by what `cached path` prints.
    others = [word for name in ("llama", "experts") for word in (places[name], autos[name])]
    told = run(site, "minilm", TRANSFORMERS, json.dumps(IDS.tolist()), autos["minilm"], *others)
    found = dict(zip(files, told["found"].values(), strict=True))
    for name, content in files.items():
        plain = getattr(transformers, autos[name]).from_pretrained(written(tmp_path / name, content))
        expected = plain(input_ids=IDS)[0].float().flatten().tolist()
        assert found[name] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert told["segments"] >= len(files)
    assert told["own_kib"] == 0, "the weights are the daemon's pages, and no copy"
