from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.errors import InvalidRequestError, NotFoundError
from cached.origins.base import OriginObject
from cached.origins.selection import Selection, select
from cached.units import GIB

LLAMA = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def items(*paths: str, size_bytes: int = 10) -> list[OriginObject]:
    return [OriginObject(path, size_bytes, "v") for path in paths]


def paths(selection: Selection) -> list[str]:
    return [item.path for item in selection.files]


def test_a_plain_model_is_taken_whole_small_files_first():
    shuffled = items(*LLAMA)
    random.Random(1).shuffle(shuffled)
    chosen = select(shuffled)
    assert paths(chosen)[-3:] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(paths(chosen)) == sorted(LLAMA)
    assert chosen.notes == ()


def test_shards_come_in_the_order_of_their_numbers():
    chosen = select(items(*(f"model-{i}-of-12.safetensors" for i in range(12, 0, -1))))
    assert paths(chosen) == [f"model-{i}-of-12.safetensors" for i in range(1, 13)]


def test_duplicate_formats_are_left_out_and_said():
    duplicates = [OriginObject(f"pytorch_model-{i}.bin", 4 * GIB, "v") for i in range(3)]
    more = items(
        "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "onnx/config.json",
        "original/consolidated.00.pth", "original/params.json", "model.onnx", "training_args.bin",
        "consolidated.safetensors",
    )  # fmt: skip
    chosen = select([*items(*LLAMA), *duplicates, *more])
    assert sorted(paths(chosen)) == sorted(LLAMA)
    assert "left out 3 *.bin files, 12.0 GiB: safetensors are there" in chosen.notes
    assert "left out 2 original/ files, 20 B: safetensors are there" in chosen.notes
    assert any("consolidated" in note for note in chosen.notes)


def test_consolidated_is_the_model_where_nothing_else_is():
    mistral = ("params.json", "tekken.json", "consolidated.safetensors")
    assert sorted(paths(select(items(*mistral)))) == sorted(mistral)


def test_a_folder_of_its_own_keeps_what_only_it_has():
    names = (
        "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin",
        "model.safetensors", "config_sentence_transformers.json", "modeling_custom.py", "vocab.txt", "merges.txt",
        "chat_template.jinja", "preprocessor_config.json", "sentencepiece.bpe.model", "README.md", "LICENSE",
    )  # fmt: skip
    assert sorted(paths(select(items(*names)))) == sorted(names)


def test_safetensors_in_a_copy_alone_do_not_count():
    names = ("pytorch_model.bin", "onnx/weights.safetensors", "config.json")
    with pytest.raises(InvalidRequestError, match=r"pytorch_model\.bin"):
        select(items(*names))


@pytest.mark.parametrize("weights_format", ["auto", "safetensors"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "sub/model.ckpt"])
def test_pickles_alone_are_refused_with_the_command_that_converts_them(name, weights_format):
    more = items("config.json", name, "optimizer.pt", "training_args.bin")
    with pytest.raises(InvalidRequestError, match="may run code") as error:
        select(more, weights_format=weights_format, source="file:///models/m/")
    assert name in str(error.value)
    assert (
        "cached convert /models/m --to /models/m-safetensors; and pull file:///models/m-safetensors" in error.value.hint
    )
    with pytest.raises(InvalidRequestError) as error:
        select(more, source="hf://org/repo")
    assert "cached convert hf://org/repo --to repo-safetensors; and: cached push repo-safetensors" in error.value.hint
    assert "format to all" in error.value.hint
    assert len(paths(select(more, weights_format="all"))) == 4


def test_what_is_neither_safetensors_nor_a_pickle_is_cached_as_files():
    for names in (("config.json", "model.onnx"), ("model.h5",), ("m-Q4_K_M.gguf",), ("weights.custom", "config.json")):
        assert sorted(paths(select(items(*names)))) == sorted(names)
    assert any("cannot be loaded as tensors" in note for note in select(items("model.onnx")).notes)


def test_gguf_alone_is_kept_and_many_are_noted():
    chosen = select(items("m-Q4_K_M.gguf", "m-Q8_0.gguf", "config.json"))
    assert paths(chosen) == ["config.json", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    assert any("2 GGUF files" in note for note in chosen.notes)
    assert select(items("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")).notes == ()
    assert paths(select(items("m-Q4_K_M.gguf", "m-Q8_0.gguf"), include=["*Q4*"])) == ["m-Q4_K_M.gguf"]


def test_gguf_beside_safetensors_is_a_choice():
    both = items("config.json", "model.safetensors", "m.gguf", "pytorch_model.bin")
    assert paths(select(both)) == ["config.json", "model.safetensors"]
    assert any("set the format to gguf" in note for note in select(both).notes)
    assert paths(select(both, weights_format="gguf")) == ["config.json", "m.gguf"]
    assert len(paths(select(both, weights_format="all"))) == 4


def test_hidden_files_and_media_are_left_out():
    chosen = select(items("a.safetensors", ".gitattributes", ".cache/huggingface/x.json", "fig.png", "demo/clip.mp4"))
    assert paths(chosen) == ["a.safetensors"]
    assert sum(note.startswith("left out") for note in chosen.notes) == 4


def test_exclude_wins_over_include():
    chosen = select(items(*LLAMA), include=["*.safetensors", "*.json"], exclude=["*-00002-*", "tokenizer*"])
    assert paths(chosen)[-2:] == ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert "tokenizer.json" not in paths(chosen)
    assert "tokenizer.model" not in paths(chosen)
    assert "left out 1 *-00002-* file, 10 B: excluded" in chosen.notes


def test_nothing_left_says_what_was_there_and_why():
    with pytest.raises(NotFoundError) as error:
        select(items("a.safetensors", "config.json"), include=["*.gguf"])
    assert "1 *.safetensors" in str(error.value)
    assert "*.gguf" in str(error.value)
    with pytest.raises(NotFoundError, match="no gguf files"):
        select(items("a.safetensors", "config.json"), weights_format="gguf")
    with pytest.raises(NotFoundError, match="no safetensors files"):
        select(items("a.onnx"), weights_format="safetensors")
    with pytest.raises(NotFoundError, match="nothing"):
        select([])


def test_unknown_format_is_refused():
    with pytest.raises(InvalidRequestError):
        select(items("a.safetensors"), weights_format="pickle")


PARTS = st.sampled_from(
    ["model", "1", "²", "10", "original", ".x", "a.safetensors", "b.bin", "c.gguf", "d.json", "e.pt"]
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), unique=True), st.sampled_from(["auto", "all"]))
def test_every_file_is_kept_or_accounted_for(names, weights_format):
    given_items = items(*names, size_bytes=1)
    try:
        chosen = select(given_items, weights_format=weights_format)
    except (NotFoundError, InvalidRequestError):
        return
    left_out = sum(int(note.split()[2]) for note in chosen.notes if note.startswith("left out"))
    assert len(chosen.files) + left_out == len(names)
    assert {item.path for item in chosen.files} <= set(names)
    assert select(given_items[::-1], weights_format=weights_format).files == chosen.files
