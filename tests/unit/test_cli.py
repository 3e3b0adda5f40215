from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cached import __version__, errors
from cached.cli.artifact import _named
from cached.cli.failures import EXIT_CODES, exit_code
from cached.cli.main import cli, main
from cached.cli.output import ago, clean, rate, to_data
from cached.cli.sections import SECTIONS
from cached.errors import CachedError, IntegrityError, InvalidRequestError, NoRoomError, NotFoundError
from cached.level import Level
from cached.types import CheckedBy, Damage, Event, PullPhase, PullProgress, Tier, VerifyProgress
from cached_client._proto import cached_pb2 as pb
from tests.unit.cli_support import Command, serving
from tests.unit.rpc_support import STATS

DESIGNED_VERBS = {
    "serve", "pull", "ls", "ps", "show", "tier", "pin", "unpin", "evict", "rm", "verify", "path", "run", "push",
    "artifact", "catalog", "convert", "simulate", "coldstart", "stats", "events", "health", "doctor", "bench",
    "config", "top", "version", "install-service", "uninstall-service",
}  # fmt: skip
READY = PullProgress(
    PullPhase.READY, "tiny", "abcdef0123456789", 3 * 2**30, 3 * 2**30, 3 * 2**30, elapsed_s=1.5,
    notes=("left out 2 files",), from_level=Level.L3, checked_by=CheckedBy.FIRST_SEEN,
)  # fmt: skip
DAMAGE = Damage("tiny", "r1", "a.safetensors", "ab" * 32, Level.L2, 3, 48, 16, repaired=False, error="no source")


@pytest.fixture
def cached(tmp_path, capfd):
    with serving(tmp_path) as (engine, socket):
        yield Command(engine, socket, capfd)


def verbs(group=cli, before=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*before, name))
        else:
            yield (*before, name)


def test_the_verbs_are_those_of_the_design():
    assert set(cli.commands) == DESIGNED_VERBS


@pytest.mark.parametrize("words", [*verbs()], ids=" ".join)
def test_each_verb_explains_itself_with_an_example(words):
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example" in result.output
    assert "\\b" not in result.output
    assert f"cached {' '.join(words)}" in result.output


def test_every_reader_speaks_json():
    def reads(words):
        group: Any = cli
        for word in words:
            group = group.commands[word]
        return any("--output" in option.opts for option in group.params)

    assert {" ".join(words) for words in verbs() if not reads(words)} == {
        "serve", "run", "path", "config example", "install-service", "uninstall-service", "catalog keygen",
        "catalog sign",
    }  # fmt: skip


def test_json_has_the_names_of_the_wire_and_numbers_as_numbers(cached):
    (model,) = json.loads(cached("ls", "-o", "json").out)
    assert model["name"] == "tiny"
    assert (model["size_bytes"], model["l1_bytes"], model["last_used_time_s"]) == (100, 90, 5.5)
    assert (model["state"], model["tier"], model["tier_from"], model["pinned"]) == ("ready", "warm", "catalog", True)
    assert set(model) == set(pb.ModelSummary.DESCRIPTOR.fields_by_name)


def test_ps(cached):
    ran = cached("ps")
    assert ran.out.splitlines()[1].split()[:6] == ["l1", "tiny@r1", "complete", "100", "B", "worker"]
    assert json.loads(cached("ps", "-o", "json").out)[0]["peer_uid"] == 14


def test_show(cached):
    ran = cached("show", "tiny")
    assert cached.engine.calls == [("describe", "tiny")]
    for told in ("/models/tiny", "skipped *.bin", "boom", "a.safetensors", "L1 L2", "first-seen", "other", "worker"):
        assert told in ran.out
    data = json.loads(cached("show", "tiny", "-o", "json").out)
    assert data["files"][0] == {
        "path": "a.safetensors", "size_bytes": 99, "sha256": "ab" * 32, "in_l1": True, "in_l2": True,
        "shared_with": ["other"], "chunk_count": 1, "checked_by": "first-seen",
    }  # fmt: skip
    assert data["places"][0] == {
        "level": "l1", "held_bytes": 90, "worth_s": 200.0, "requests": 2.5, "reload_s": 80.0,
        "why": "90 B in l1: it spares 3m20s", "evicted_before": ["other", "last"], "evicted_before_count": 2,
        "verified_time_s": 1e9,
    }  # fmt: skip
    assert (data["schedule"], data["schedule_change_time_s"]) == (["mon-fri 08:00-20:00"], 4102444800.0)
    assert data["pull_times_s"] == [4102444801.0]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (("tier", "tiny", "hot"), ("set_tier", "tiny", Tier.HOT)),
        (("pin", "tiny"), ("pin", "tiny")),
        (("unpin", "tiny"), ("unpin", "tiny")),
        (("evict", "tiny"), ("evict", "tiny", None)),
        (("evict", "tiny", "--level", "l1"), ("evict", "tiny", Level.L1)),
        (("rm", "tiny@abcd"), ("remove", "tiny@abcd")),
    ],
)
def test_verbs_that_change_something(cached, arguments, call):
    assert cached(*arguments).code == 0
    assert cached.engine.calls == [call]
    assert json.loads(cached(*arguments, "-o", "json").out)


def test_path(cached):
    assert cached("path", "tiny").out == "/models/tiny\n"


def test_pull_says_what_came_from_where_and_what_it_was_checked_by(cached):
    cached.engine.progress = [PullProgress(PullPhase.RESOLVING, "tiny"), READY]
    ran = cached("pull", "tiny", "--source", "s3://b/tiny", "--tier", "hot", "--level", "l2", "--timeout", "1m")
    assert cached.engine.calls == [("pull", "tiny", "s3://b/tiny", Tier.HOT, Level.L2, True)]
    assert ran.out == "tiny@abcdef012345: 3.0 GiB in 1.5 s (2.1 GB/s) from the origin, checked by first-seen\n"
    assert "note: left out 2 files" in ran.err
    assert "tiny: ready 100% of 3.0 GiB" in ran.err


def test_pull_for_programs_prints_one_document_and_nothing_else(cached):
    cached.engine.progress = [READY]
    ran = cached("pull", "tiny", "-o", "json")
    data = json.loads(ran.out)
    assert (data["phase"], data["from_level"], data["total_bytes"]) == ("ready", "l3", 3 * 2**30)
    assert ran.err == ""


def test_pull_without_waiting(cached):
    cached.engine.progress = [PullProgress(PullPhase.ACCEPTED, "tiny")]
    ran = cached("pull", "tiny", "--no-wait")
    assert cached.engine.calls[0][-1] is False
    assert "goes on in the background" in ran.out


def test_a_pull_that_begins_later(cached):
    cached.engine.progress = [PullProgress(PullPhase.SCHEDULED, "tiny")]
    ran = cached("pull", "tiny", "--at", "2100-01-01T08:00Z")
    assert cached.engine.calls[-1][-1] == 4102473600.0
    assert ran.out.startswith("tiny: pulled at 2100-01-01 ")
    ran = cached("pull", "tiny", "--at", "2100-01-01T08:00Z", "-o", "json")
    assert json.loads(ran.out)["at_time_s"] == 4102473600.0
    ran = cached("pull", "tiny", "--at", "never")
    assert cached.engine.calls[-1][-1] == float("inf")
    assert ran.out == "tiny: no pull of it will begin by itself\n"
    assert json.loads(cached("pull", "tiny", "--at", "never", "-o", "json").out)["at_time_s"] is None


def test_a_time_that_has_passed_is_refused_before_anything_is_asked(cached):
    ran = cached("pull", "tiny", "--at", "2001-01-01")
    assert (ran.code, cached.engine.calls) == (2, [])
    assert "'2001-01-01' was" in ran.err


def test_a_pull_that_ends_without_a_result_has_failed(cached):
    cached.engine.progress = [PullProgress(PullPhase.TRANSFERRING, "tiny")]
    assert cached("pull", "tiny").code == 1


def test_verify_lists_damage_and_fails_while_it_remains(cached):
    cached.engine.verify_progress = [
        VerifyProgress(100, 50, DAMAGE, finished=False, damaged_chunks=1, repaired_chunks=0),
        VerifyProgress(100, 100, None, finished=True, damaged_chunks=1, repaired_chunks=0),
    ]
    ran = cached("verify", "tiny", "--repair")
    assert cached.engine.calls == [("verify", "tiny", True)]
    assert ran.code == 6
    assert ran.out.splitlines()[1].split() == ["tiny@r1", "a.safetensors", "L2", "3", "48-63", "no:", "no", "source"]
    data = json.loads(cached("verify", "-o", "json").out)
    assert data["damage"][0]["chunk_index"] == 3
    assert cached.engine.calls[-1] == ("verify", None, False)
    mended = VerifyProgress(100, 100, None, finished=True, damaged_chunks=1, repaired_chunks=1)
    cached.engine.verify_progress = [mended]
    assert cached("verify").code == 0


def test_stats(cached):
    ran = cached("stats")
    assert ran.out.splitlines()[1].split() == [
        "L1",
        "100",
        "B",
        "60",
        "B",
        "10",
        "B",
        "5",
        "B",
        "7",
        "B",
        "11",
        "B",
        "12",
        "B",
        "of",
        "80",
        "B",
        "3",
        "2h00m",
        "configured",
    ]
    assert "250 B of 1000 B, waiting for loads" in ran.out
    assert "l2 is read-only" in ran.out
    data = json.loads(cached("stats", "-o", "json").out)
    assert data["counters"] == STATS.counters
    assert data["levels"][0]["level"] == "l1"


def test_events_end_by_themselves_unless_followed(cached):
    cached.engine.events = [Event(5.0, "pull.ready", "tiny", "r1", "it is \x1b[31mthere", {"a": "b"})]
    ran = cached("events")
    assert "pull.ready" in ran.out
    assert "\x1b" not in ran.out
    (line,) = cached("events", "--follow", "-o", "json").out.splitlines()
    assert json.loads(line)["fields"] == {"a": "b"}


def test_health(cached):
    ran = cached("health")
    assert (ran.code, ran.out.splitlines()[1]) == (0, "  l2 is read-only")


def test_health_of_a_daemon_that_starts(tmp_path, capfd):
    with serving(tmp_path, serving=False) as (engine, socket):
        ran = Command(engine, socket, capfd)("health", "-o", "json")
    assert ran.code == 1
    assert json.loads(ran.out)["serving"] is False


def test_version_with_and_without_a_daemon(cached, tmp_path):
    told = json.loads(cached("version", "-o", "json").out)
    assert told == {
        "cached": __version__, "cached_client": __version__, "daemon": "1", "python": platform.python_version(),
        "protocol": "cached.v1", "state_layout": 1,
    }  # fmt: skip
    assert "the daemon still runs 1: restart it" in cached("version").out
    cached.socket = tmp_path / "none.sock"
    ran = cached("version")
    assert ran.code == 0
    assert "none answers" in ran.out


def test_nobody_answers(cached, tmp_path):
    cached.socket = tmp_path / "none.sock"
    for words in (("ls",), ("events",), ("health",), ("pull", "m")):
        ran = cached(*words)
        assert ran.code == 1
        assert ran.out == ""
        assert str(cached.socket) in ran.err
        assert "hint: " in ran.err


def test_errors_show_what_matters_and_what_to_do(cached):
    cached.engine.error = NoRoomError(
        "L1 has no room for tiny", hint="unpin something", level="l1", needed_bytes=100, holders="big (pinned, 90 B)"
    )
    ran = cached("pull", "tiny")
    assert ran.code == 5
    told = [re.sub("[0-9a-f]{32}", "…", line) for line in ran.err.splitlines()]
    assert told == [
        "error: L1 has no room for tiny", "  holders: big (pinned, 90 B)", "  level: l1", "  needed_bytes: 100",
        "  trace_id: …", "hint: unpin something",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", errors.all_errors().values(), ids=lambda kind: kind.reason)
def test_each_reason_has_its_exit_code_through_the_wire(cached, kind):
    cached.engine.error = kind("what happened")
    ran = cached("show", "tiny")
    assert ran.code == exit_code(kind.reason)
    assert ran.code == {
        "INVALID_REQUEST": 2, "NOT_FOUND": 3, "NO_SOURCE": 3, "TIMED_OUT": 4, "NO_ROOM": 5, "INTEGRITY": 6,
        "QUARANTINED": 6,
    }.get(kind.reason, 1)  # fmt: skip
    assert "error: " in ran.err
    assert "Traceback" not in ran.err


def test_reasons_of_exit_codes_exist():
    assert set(EXIT_CODES) <= set(errors.all_errors())


def test_an_error_that_nobody_foresaw_is_told_without_its_insides(cached):
    cached.engine.error = ValueError("inside")
    ran = cached("ls")
    assert ran.code == 1
    assert "inside" not in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",), ("pull",), ("pull", "../x"), ("pull", "m", "--tier", "l1"), ("pull", "m", "--timeout", "soon"),
        ("evict", "m", "--level", "l3"), ("tier", "m", "l1"), ("run", "m"), ("ls", "-o", "yaml"),
    ],
)  # fmt: skip
def test_wrong_usage(cached, words):
    ran = cached(*words)
    assert ran.code == 2
    assert "Error: " in ran.err
    assert cached.engine.calls == []


def test_an_interruption_ends_without_a_traceback(cached):
    cached.engine.events = [Event(5.0, "pull.ready", message="it is there")]
    cached.engine.keeps_watching = True
    code = "import sys; from cached.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--socket", str(cached.socket), "events", "--follow"]
    # Where the tests run in the background of a shell SIGINT is ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        assert "it is there" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.strip() == "interrupted"


def test_config_show_says_where_values_are_from(tmp_path, capfd, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text('[l1]\ncapacity = "3GiB"\n')
    monkeypatch.setenv("CACHED_L2_ENABLED", "false")
    assert main(["config", "show", "--config", str(file), "-o", "json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["l1.capacity"] == {"value": "3GiB", "origin": f"file {file}:2"}
    assert data["l2.enabled"] == {"value": False, "origin": "environment CACHED_L2_ENABLED"}
    file.write_text("[l1]\ncapacity = 3\n")
    assert main(["config", "show", "--config", str(file)]) == 1
    assert "l1.capacity = 3" in capfd.readouterr().err


def test_catalog_validate(tmp_path, capfd):
    file = tmp_path / "c.json"
    file.write_text('{"models": {"m": {"source": "s3://b/m", "tier": "hot", "size": "26GB"}}}')
    assert main(["catalog", "validate", str(file)]) == 0
    assert "is valid: 1 model\n" in capfd.readouterr().out
    assert main(["catalog", "validate", str(file), "-o", "json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["size_bytes"] == 26 * 10**9
    file.write_text('{"models": {"m": {"source": "s3://b/m", "tier": "hott", "sise": 1}}}')
    assert main(["catalog", "validate", str(file)]) == 1
    told = capfd.readouterr().err
    assert "did you mean 'hot'?" in told
    assert "did you mean 'size'?" in told


def test_serve_refuses_settings_that_are_wrong(capfd):
    assert main(["serve", "--l1-capacity", "lots"]) == 1
    told = capfd.readouterr().err
    assert "flag --l1-capacity" in told
    assert "hint: write a size" in told


def test_push_to_a_folder_prints_an_entry_that_a_catalog_takes(tmp_path, capfd):
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", ".hidden", ".git/x"):
        (source / name).write_bytes(name.encode())
    uri = f"file://{tmp_path}/target/tiny"
    (tmp_path / "target/tiny").mkdir(parents=True)
    assert main(["push", str(source), uri]) == 0
    captured = capfd.readouterr()
    sent = sorted(item.name for item in (tmp_path / "target/tiny").rglob("*") if item.is_file())
    assert sent == ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert "3 files" in captured.err
    file = tmp_path / "c.json"
    file.write_text(captured.out)
    assert main(["catalog", "validate", str(file), "-o", "json"]) == 0
    (model,) = json.loads(capfd.readouterr().out)
    assert model["source"] == uri
    assert sorted(model["sha256"]) == ["config.json", "model.safetensors"]


def test_push_of_nothing(tmp_path, capfd):
    assert main(["push", str(tmp_path), f"file://{tmp_path}"]) == 3
    assert main(["push", str(tmp_path / "no"), "s3://b/x"]) == 2
    (tmp_path / "a").write_text("a")
    assert main(["push", str(tmp_path), "ftp://b/x"]) == 2
    capfd.readouterr()


def test_an_artifact_is_named_by_its_beginning():
    known = [pb.Artifact(name=f"artifact.{digits}") for digits in ("aab", "aac", "b")]
    assert _named("b", known) is known[2]
    assert _named("artifact.aac", known) is known[1]
    for name in ("c", "", "artifact."):
        with pytest.raises(NotFoundError, match="there is no artifact"):
            _named(name, known)
    with pytest.raises(InvalidRequestError, match="2 artifacts begin with 'aa'"):
        _named("aa", known)


def test_numbers_and_enums_that_are_not_set():
    data = to_data(pb.PullResponse(progress=pb.PullProgress()))["progress"]
    assert (data["phase"], data["from_level"], data["notes"], data["total_bytes"]) == ("", "", [], 0)
    assert to_data(pb.PullResponse())["progress"] is None


def test_small_words():
    assert clean("a\x1b]0;b\nc") == "a\N{REPLACEMENT CHARACTER}]0;b\N{REPLACEMENT CHARACTER}c"
    assert (rate(3e9, 2), rate(5e6, 1), rate(0, 1), rate(1, 0)) == ("1.5 GB/s", "5.0 MB/s", "", "")
    assert (ago(0), ago(10, 85)) == ("-", "1m15s ago")
    kinds: list[type[CachedError]] = [NotFoundError, IntegrityError]
    assert [exit_code(kind.reason) for kind in kinds] == [3, 6]


def test_only_what_is_run_is_imported():
    code = """
import sys
from cached.cli.main import main
main(["config", "example"])
sys.exit(any(name in sys.modules for name in ("cached.cli.doctor", "cached.cli.serve", "cached.daemon")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "[l1]" in done.stdout


def test_every_command_is_shown_once_in_a_section():
    listed = [name for names in SECTIONS.values() for name in names]
    assert len(set(listed)) == len(listed)
    shown = CliRunner().invoke(cli, ["--help"]).output
    for name in cli.commands:
        assert len(re.findall(rf"^  {name} +\S", shown, re.MULTILINE)) == 1, name
