"""What the load format ``cached`` may be told, and from a directory to a name; without vLLM."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cached_client.errors import InvalidRequestError
from cached_client.integrations.vllm.compile_cache import unit_of
from cached_client.integrations.vllm.naming import STAGED_MARK, choose_ref, pinned_ref
from cached_client.integrations.vllm.options import LoaderOptions, parse_options
from cached_client.integrations.vllm.weights import LoadTimings

REVISION = "278fd09438335ae388a27158e8dc0245"


def test_defaults_need_nothing():
    assert parse_options(None) == parse_options({}) == LoaderOptions()
    assert LoaderOptions().fallback == "none"


def test_every_option_is_taken():
    given: dict[str, Any] = {
        "model": "llama", "socket": "/run/c.sock", "source": "s3://b/llama", "wait": True, "timeout_s": 60,
        "daemon_timeout_s": 0, "hold": True, "keep_alive_s": 1.5, "fallback": "auto", "ring": False,
        "compile_cache": True, "report_start": False,
        "gpu": {"threads": 4, "slot_bytes": 8192, "steps": 2, "bind": False, "ahead_bytes": 1, "buffer_bytes": 1},
    }  # fmt: skip
    options = parse_options(given)
    taken = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
    assert set(taken) == set(given)
    gpu = taken.pop("gpu")
    assert taken == {key: value for key, value in given.items() if key != "gpu"}
    assert {key: getattr(gpu, key) for key in given["gpu"]} == given["gpu"]
    assert gpu.register_after is None


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(InvalidRequestError, match="'modle', 'tcp'") as caught:
        parse_options({"tcp": 1, "model": "llama", "modle": "x"})
    assert all(item.name in caught.value.hint for item in dataclasses.fields(LoaderOptions))


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["model"], "not an object"),
        ({"model": 1}, "text"),
        ({"socket": None}, "text"),
        ({"wait": 1}, "true or false"),
        ({"hold": "yes"}, "true or false"),
        ({"compile_cache": "on"}, "true or false"),
        ({"report_start": 0}, "true or false"),
        ({"timeout_s": "soon"}, "seconds"),
        ({"timeout_s": True}, "seconds"),
        ({"timeout_s": -1}, "seconds"),
        ({"daemon_timeout_s": None}, "seconds"),
        ({"keep_alive_s": float("nan")}, "seconds"),
        ({"fallback": "always"}, "'none', 'auto'"),
        ({"fallback": ["auto"]}, "'none', 'auto'"),
        ({"gpu": 8}, "an object"),
        ({"gpu": {"register_after": 1}}, "it knows"),
        ({"gpu": {"threads": 1.5}}, "whole number"),
        ({"gpu": {"threads": True}}, "whole number"),
        ({"gpu": {"threads": 0}}, "at least 1"),
        ({"gpu": {"bind": 1}}, "true or false"),
    ],
)
def test_wrong_values_are_refused(extra, told):
    with pytest.raises(InvalidRequestError) as caught:
        parse_options(extra)
    assert told in str(caught.value)


@pytest.fixture
def view(tmp_path: Path) -> Path:
    """A directory view with one model."""
    (tmp_path / ".views" / f"llama@{REVISION}").mkdir(parents=True)
    (tmp_path / "llama").symlink_to(f".views/llama@{REVISION}")
    return tmp_path / "llama"


def test_a_directory_of_the_view_names_its_revision(view):
    assert pinned_ref(str(view)) == f"llama@{REVISION}"
    assert pinned_ref(str(view.resolve())) == f"llama@{REVISION}"
    assert choose_ref(f"{view}/", "") == f"llama@{REVISION}"


def test_a_staged_folder_names_its_revision(tmp_path):
    (tmp_path / STAGED_MARK).write_text(f"llama@{REVISION}\n")
    assert pinned_ref(str(tmp_path)) == f"llama@{REVISION}"


@pytest.mark.parametrize("content", [b"", b"llama", b"../x@278fd094", b"\xff\xfe", b"llama@" + b"0" * 500])
def test_a_mark_that_is_none_does_not_count(tmp_path, content):
    (tmp_path / STAGED_MARK).write_bytes(content)
    assert pinned_ref(str(tmp_path)) == ""


def test_a_folder_elsewhere_needs_the_option(tmp_path):
    other = tmp_path / "views" / f"llama@{REVISION}"
    other.mkdir(parents=True)
    assert pinned_ref(str(other)) == ""
    assert choose_ref(str(other), "llama") == "llama"
    with pytest.raises(InvalidRequestError, match="does not know which model") as caught:
        choose_ref(str(other), "")
    assert "cached path NAME" in caught.value.hint


def test_the_directory_pins_what_the_option_names(view):
    assert choose_ref(str(view), "llama") == choose_ref(str(view), f"llama@{REVISION[:8]}") == f"llama@{REVISION}"


@pytest.mark.parametrize("configured", ["mistral", "llama@0000", "llam"])
def test_two_names_that_differ_are_refused(view, configured):
    with pytest.raises(InvalidRequestError, match=r"llama@278fd.*names the model"):
        choose_ref(str(view), configured)


def test_a_reload_may_name_the_cache_itself():
    assert choose_ref("cached://mistral", "") == "mistral"


def test_the_log_line_tells_the_phases_and_what_was_done_without():
    timings = LoadTimings(f"llama@{REVISION}", "1/2", "l3", tensors=3, tensor_bytes=2_000_000_000, total_s=4.0)
    assert f"model=llama@{REVISION} rank=1/2 level=l3 device=cpu path=views tensors=3" in timings.line()
    assert "gb_per_s=0.50" in timings.line()
    assert timings.line().endswith("fallbacks=0")
    timings.fallbacks = ("no pinned memory",)
    assert timings.line().endswith("fallbacks=1 (no pinned memory)")


def test_without_vllm_the_package_can_be_imported_and_says_what_is_missing():
    code = (
        "import sys\n"
        "import cached_client.integrations.vllm as plugin\n"
        "assert not {'vllm', 'torch', 'numpy', 'grpc'} & set(sys.modules)\n"
        "for register in (plugin.register, plugin.register_lora):\n"
        "    try:\n"
        "        register()\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name == 'vllm', error\n"
        "    else:\n"
        "        raise SystemExit('registered without vLLM')\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_vllm_finds_both_plugins_by_their_entry_points():
    from importlib.metadata import entry_points

    import cached_client.integrations.vllm as plugin

    found = {item.name: item.load() for item in entry_points(group="vllm.general_plugins")}
    assert found == {"cached": plugin.register, "cached_lora": plugin.register_lora}


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("torch_aot_compile/0a1b/rank_0_0/model", "torch_aot_compile/0a1b"),
        ("torch_aot_compile/0a1b/inductor_cache/ab/kernel.so", "torch_aot_compile/0a1b"),
        ("1234567890/rank_1_0/backbone/computation_graph.py", "1234567890"),
    ],
)
def test_each_configuration_has_a_folder_of_the_compile_cache(path, unit):
    assert unit_of(path) == unit
