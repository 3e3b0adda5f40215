"""What is made for one measurement goes, and a signal that comes meanwhile is not lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cached.cli.measure.scratch import ended_in_order, scratch_file, undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_what_cleans_up_is_heard_after_it(number):
    done = []
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as raised, ended_in_order():
        with undisturbed(), undisturbed():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            done.append("cleaned up")
        done.append("measured on")
    assert done == ["cleaned up"]
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 128 + number


def test_a_signal_while_the_file_is_removed_ends_the_measurement(tmp_path, monkeypatch):
    unlink = Path.unlink

    def interrupted(path: Path, **arguments: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        unlink(path, **arguments)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(SystemExit), ended_in_order(), scratch_file(tmp_path, 4096):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_ignored_stays_so_and_who_listened_hears_again():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
