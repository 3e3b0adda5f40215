"""`cached convert` as users run it: real checkpoints of torch, real pickles that would do harm, a real sandbox."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cached_client
from cached.cli.main import cli as commands
from cached.convert.checkpoint import Checkpoint, plan_conversion
from cached.convert.child import _Conversion
from cached.convert.sandbox import enter
from cached.errors import IntegrityError, InvalidRequestError, NotFoundError
from tests.fault_proxy import CountingProxy
from tests.http_servers import Hub
from tests.integration.harness import DaemonProcess
from tests.integration.support import SERVE


def convert(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVE, "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **(env or {})},
    )


def state() -> dict[str, torch.Tensor]:
    """Of several types, some that share memory, some not contiguous, one empty, with NaN."""
    torch.manual_seed(1)
    embedding = torch.randn(64, 32)
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    return {
        "embed.weight": embedding,
        "lm_head.weight": embedding,
        "half": torch.randn(50, 10).to(torch.bfloat16),
        "float8": torch.randn(16, 16).to(torch.float8_e4m3fn),
        "transposed": base.t(),
        "part": base[3:7],
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        same = found[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name


def test_a_checkpoint_in_shards_with_its_companions(tmp_path):
    source, tensors = tmp_path / "bin", state()
    source.mkdir()
    names = list(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:4], "pytorch_model-00002-of-00002.bin": names[4:]}
    for file, some in shards.items():
        torch.save({name: tensors[name] for name in some}, source / file)
    weight_map = {name: file for file, some in shards.items() for name in some}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text("{}")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.txt").write_text("a")
    (source / "optimizer.pt").write_bytes(b"not looked at")
    (source / "README.md").write_text("# A model")
    done = convert(source, "--to", tmp_path / "made" / "st", "--max-shard-size", "4KB", "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    made = tmp_path / "made" / "st"
    assert_same(made, tensors)
    assert told["tensors"] == len(tensors)
    assert told["left_out"] == ["optimizer.pt"]
    assert told["copied"] == ["README.md", "config.json", "tokenizer/vocab.txt"]
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert {made / name for name in index["weight_map"].values()} == set(made.glob("*.safetensors"))
    assert len(list(made.glob("model-0*-of-0*.safetensors"))) > 2
    assert any("lm_head.weight is written of its own" in note for note in told["notes"])
    assert [path.name for path in made.parent.iterdir()] == ["st"], "nothing is left beside it"
    assert "sandbox:" in done.stderr


def test_what_was_converted_is_loaded_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    (tmp_path / "bin").mkdir()
    config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    done = convert(tmp_path / "bin", "--to", tmp_path / "st", "--drop-shared")
    assert done.returncode == 0, done.stderr
    assert "is left out, as the same as" in done.stderr
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "st", local_files_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_one_file_and_a_wrapped_state(tmp_path):
    tensors = {"w": torch.ones(3)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.ckpt")
    done = convert(tmp_path / "last.ckpt", "--to", tmp_path / "st")
    assert done.returncode == 0, done.stderr
    assert "only 'state_dict' is taken, not epoch" in done.stderr
    assert_same(tmp_path / "st", tensors)
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "st2").mkdir()
    assert "old format" in str(convert_here(tmp_path / "st2", tmp_path / "old.bin")["notes"])
    assert_same(tmp_path / "st2", tensors)


class _Harmful:
    """Unpickling this makes a file."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._proof}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_a_program_is_refused(tmp_path, new_format):
    proof = tmp_path / "proof"
    torch.save(
        {"w": torch.ones(2), "x": _Harmful(proof)}, tmp_path / "evil.bin", _use_new_zipfile_serialization=new_format
    )
    done = convert(tmp_path / "evil.bin", "--to", tmp_path / "st")
    assert done.returncode == 6, done.stderr
    assert "holds more than weights" in done.stderr
    assert "system" in done.stderr
    assert not proof.exists()
    assert not (tmp_path / "st").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.bin"]
    if new_format:  # the same file does what it is made for where nobody looks
        with zipfile.ZipFile(tmp_path / "evil.bin") as file:
            data = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))

        class _Careless(pickle.Unpickler):
            def persistent_load(self, pid):
                return None

            def find_class(self, module, name):
                return (lambda *_: None) if module.startswith("torch") else super().find_class(module, name)

        import io

        _Careless(io.BytesIO(data)).load()
        assert proof.exists()


def convert_here(folder: Path, *files: Path) -> Any:
    """What the sandboxed process does, in this one."""
    order = {
        "files": [str(file) for file in files],
        "folder": str(folder),
        "max_shard_bytes": 1000,
        "drop_shared": False,
    }
    return _Conversion(order).run()


def test_what_cannot_be_read_is_damaged(tmp_path):
    torch.save({"w": torch.randn(100, 100)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for name, data in (("rubbish.bin", bytes([187]) * 500), ("empty.bin", b""), ("cut.bin", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(IntegrityError, match="cannot be read") as error:
            convert_here(tmp_path, tmp_path / name)
        assert error.value.fields["path"].endswith(name)
    done = convert(tmp_path / "cut.bin", "--to", tmp_path / "st")
    assert done.returncode == 6, done.stderr
    assert "get it again" in done.stderr
    assert not (tmp_path / "st").exists()
    (tmp_path / "st").mkdir()
    assert "is there already" in convert(tmp_path / "whole.bin", "--to", tmp_path / "st").stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"w": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
        ([torch.ones(2)], "not a table of tensors"),
        ({"w": torch.eye(3).to_sparse()}, "dense tensors|is torch"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({}, "no tensors"),
        ({"w": torch.zeros(1).expand(1 << 40)}, "4 times the room"),
        ({f"w{number}": torch.zeros(1).expand(1 << 22) for number in range(8)}, "4 times the room"),
    ],
)
def test_what_is_no_table_of_tensors_is_said_so(tmp_path, value, says):
    torch.save(value, tmp_path / "odd.bin")
    with pytest.raises(InvalidRequestError, match=says) as error:
        convert_here(tmp_path, tmp_path / "odd.bin")
    assert error.value.hint


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(NotFoundError, match=r"no \.bin"):
        plan_conversion(tmp_path)
    files = []
    for rank in range(2):
        files.append(tmp_path / f"consolidated.0{rank}.pth")
        torch.save({"w": torch.ones(2)}, files[-1])
    assert plan_conversion(tmp_path).checkpoints == (Checkpoint(tuple(files), "model"),)
    with pytest.raises(InvalidRequestError, match="both have a tensor w"):
        convert_here(tmp_path, *files)
    (tmp_path / "x.bin.index.json").write_text('{"weight_map": {"w": "gone.bin"}}')
    with pytest.raises(IntegrityError, match=r"names gone\.bin, which is not there"):
        plan_conversion(tmp_path)
    (tmp_path / "x.bin.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
    with pytest.raises(InvalidRequestError, match="passwd"):
        plan_conversion(tmp_path)


@pytest.mark.parametrize("source", ["w.bin", "hf://org/repo"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, source):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    (tmp_path / "file").touch()
    for place in (Path("/proc/nope/x"), tmp_path / "file/x"):
        done = convert(source if "://" in source else tmp_path / source, "--to", place)
        assert done.returncode == 2
        assert f"{place} cannot be written: " in done.stderr
        assert "Traceback" not in done.stderr


def test_the_command_that_a_refusal_gives_is_the_one_that_helps(tmp_path):
    """A pull of pickles is refused; what its hint says is done, word for word; then the model is pulled and served."""
    source = tmp_path / "m"
    source.mkdir()
    tensors = {"w": torch.randn(300, 300), "v": torch.ones(5)}
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    with DaemonProcess(tmp_path / "d") as daemon, cached_client.connect(str(daemon.socket)) as cache:
        with pytest.raises(cached_client.CacheError, match="may run code") as error:
            list(cache.pull("m", source=f"file://{source}", timeout_s=60))
        match = re.search(r"cached (convert \S+ --to \S+); and pull (file://\S+)\.", error.value.hint)
        assert match, error.value.hint
        done = convert(*match[1].split()[1:])
        assert done.returncode == 0, done.stderr
        assert list(cache.pull("m", source=match[2], timeout_s=60))[-1].phase == "ready"
        with cache.attach("m") as model:
            assert {name: model.tensor(name).tolist() for name in model.names()} == {
                name: tensor.tolist() for name, tensor in tensors.items()
            }


def test_a_checkpoint_of_a_hub_is_downloaded_verified_and_converted(tmp_path):
    torch.save(tensors := state(), tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    with Hub() as hub, CountingProxy(hub.cdn.url) as proxy:
        hub.cdn_url = proxy.endpoint_url
        hub.commit("org/repo", {"pytorch_model.bin": data, "config.json": b"{}", "optimizer.pt": b"x" * 2000})
        env = {"CACHED_HF_ENDPOINT": hub.url, "HF_HOME": os.devnull}
        proxy.inject("corrupt", after_bytes=3000)
        done = convert("hf://org/repo", "--to", tmp_path / "st", env=env)
        assert done.returncode == 6, done.stderr
        assert "not what the origin's own checksum says" in done.stderr
        proxy.inject("status", status=503)
        done = convert("hf://org/repo", "--to", tmp_path / "st", env=env)
        assert done.returncode == 0, done.stderr
        assert {seen.path.partition("name=")[2] for seen in proxy.gets()} == {"pytorch_model.bin"}
    assert_same(tmp_path / "st", tensors)
    assert (tmp_path / "st" / "config.json").read_bytes() == b"{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytorch_model.bin", "st"]


def test_without_torch_it_says_what_to_install(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise ImportError('no torch here')")
    done = convert(tmp_path / "w.bin", "--to", tmp_path / "st", env={"PYTHONPATH": str(tmp_path / "blocked")})
    assert done.returncode == 2
    assert "pip install 'cached[convert]'" in done.stderr


def test_the_sandbox_holds_what_it_says(tmp_path):
    """In a process of its own, as the conversion enters it."""
    code = f"""
import json, os, socket, sys
from cached.convert.checkpoint import Checkpoint, plan_conversion
from cached.convert.child import _Conversion
from cached.convert.sandbox import enter
from cached.errors import IntegrityError, InvalidRequestError, NotFoundError
measures = {{item.name: item.active for item in enter({str(tmp_path / "in")!r}, largest_file_bytes=1 << 20)}}
def does(action):
    try: action()
    except OSError: return False
    return True
def write(path):
    with open(path, "wb") as file: file.write(b"x")
def reach():
    with socket.create_connection(("127.0.0.1", {{port}}), 5): pass
def grow():
    with open({str(tmp_path / "in" / "large")!r}, "wb") as file: file.write(bytes(2 << 20))
print(json.dumps({{
    "measures": measures, "in": does(lambda: write({str(tmp_path / "in" / "x")!r})),
    "out": does(lambda: write({str(tmp_path / "out")!r})),
    "over": does(lambda: os.truncate({str(tmp_path / "there")!r}, 0)),
    "network": does(reach), "large": does(grow),
}}))
"""
    (tmp_path / "in").mkdir()
    (tmp_path / "there").write_bytes(b"kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = code.replace("{port}", str(server.getsockname()[1]))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    active = told["measures"]
    assert active["no new privileges"]
    assert active["limits of files and cores"]
    assert told["in"]
    assert not told["large"]
    assert not (active["no network"] and told["network"])
    assert not (active["no writing elsewhere"] and (told["out"] or told["over"]))
    assert active["no writing elsewhere"] or active["no network"], "neither: what is this test run in?"
    assert enter.__doc__
    assert "convert" in commands.commands


def test_a_sandbox_that_has_to_be_whole(tmp_path):
    """Within a process that may make no user namespace and no ruleset, which is what a strict container is."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    (tmp_path / "sitecustomize.py").write_text(
        "import cached.convert.sandbox as s\n"
        "def refuse(*_): raise PermissionError(1, 'Operation not permitted')\n"
        "s._leave_network = refuse\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    done = convert(tmp_path / "w.bin", "--to", tmp_path / "st", "--require-sandbox", env=env)
    assert done.returncode == 2
    assert "not whole: no network (Operation not permitted)" in done.stderr
    assert not (tmp_path / "st").exists()
    done = convert(tmp_path / "w.bin", "--to", tmp_path / "st", env=env)
    assert done.returncode == 0, done.stderr
    assert "WARNING: this kernel or container does not allow: no network" in done.stderr
