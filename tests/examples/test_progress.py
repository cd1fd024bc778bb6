"""Progress of the examples: lines in a file while the work goes on, a bar on a terminal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

progress = pytest.importorskip("progress", reason="needs the packages of the examples extra")
EXAMPLES = Path(progress.__file__).parent
FORCED = ("FORCE_COLOR", "TTY_INTERACTIVE")
"""Make rich take a file for a terminal."""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test says, where the output is no terminal."""
    for name in FORCED:
        monkeypatch.delenv(name, raising=False)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress.Steps("training", 1200) as steps:
        for done in range(1, 1201):
            clock[0] += 1 / 32
            steps.reach(done, f"loss {3 - done / 400:.2f}" if done % 100 == 0 else None)
    assert capsys.readouterr().out.splitlines() == [
        "training: 320 of 1,200, 0:10 elapsed, 0:28 remaining, loss 2.25",
        "training: 640 of 1,200, 0:20 elapsed, 0:18 remaining, loss 1.50",
        "training: 960 of 1,200, 0:30 elapsed, 0:08 remaining, loss 0.75",
        "training: 1,200 of 1,200, 0:38 elapsed, loss 0.00",
    ]


def test_what_was_done_before_does_not_make_the_rest_look_quick(clock, capsys):
    with progress.Steps("training", 100, done=80) as steps:
        clock[0] += 60
        steps.reach(90)
    assert capsys.readouterr().out.splitlines()[0] == "training: 90 of 100, 1:00 elapsed, 1:00 remaining"


def test_an_interrupted_work_does_not_say_that_it_ended(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress.Steps("testing", 3):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


def test_items_are_given_in_order_and_counted(clock, capsys):
    assert list(progress.tracked(["a", "b"], "testing")) == ["a", "b"]
    assert capsys.readouterr().out == "testing: 2 of 2, 0:00 elapsed\n"


def test_a_process_that_is_not_shown_says_nothing(clock, capsys):
    with progress.Steps("training", 2, shown=False) as steps:
        clock[0] += 60
        steps.reach(2)
    assert capsys.readouterr().out == ""


SCRIPT = """
import sys, time
import progress
progress.EVERY = 0.01
with progress.Steps("training", 3) as steps:
    time.sleep(0.02)
    steps.reach(1, "loss 0.5")
    sys.stdin.read()
"""


def test_lines_are_in_the_file_while_the_work_goes_on(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in FORCED}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], cwd=EXAMPLES, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "log").read_text() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            assert (tmp_path / "log").read_text().startswith("training: 1 of 3, 0:00 elapsed, 0:00 remaining, loss 0.5\n")
        finally:
            process.communicate()
    assert process.returncode == 0


def test_a_terminal_gets_a_bar_and_no_lines(clock, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.Steps("training", 2) as steps:
        clock[0] += 60
        assert list(progress.tracked("abcdefg", "predicting")) == list("abcdefg"), "a bar within is a second one"
        steps.reach(2, "loss 0.5")
    shown = capsys.readouterr().out
    assert "2/2" in shown
    assert "/7" in shown
    assert "loss 0.5" in shown
    assert "elapsed" not in shown
