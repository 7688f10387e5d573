import io
import itertools
import sys
import time
from collections.abc import Callable

import pytest

from pipeline.console import closing_box, progress, say, show_marked, show_table, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """A function that makes stdout a terminal. Not done at once: pytest sets stdout anew when the test begins."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def begin() -> Terminal:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        return screen

    return begin


def test_short_work_passes_through_a_log_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "shard", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_long_work_tells_a_log_how_far_it_is_a_few_times_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=5)  # every item takes 5 seconds
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: float(next(clock)))
        assert list(track(range(10), "verify", total=10, unit="files")) == list(range(10))
    assert capsys.readouterr().out.splitlines() == [
        "verify: 3 of 10 files, 0/s, 35 s left",
        "verify: 6 of 10 files, 0/s, 20 s left",
        "verify: 9 of 10 files, 0/s, 5 s left",
    ]


def test_what_an_earlier_run_has_done_counts_for_the_bar_but_not_for_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=20)
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: float(next(clock)))
        with progress("write", total=1000, already=600) as show:
            show(600)
            show(700)
    assert capsys.readouterr().out == "write: 700 of 1,000 images, 2/s, 120 s left\n"


def test_a_name_that_is_no_text_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    say("caf\udce9.jpg")
    assert capsys.readouterr().out == "caf\\udce9.jpg\n"


def test_a_terminal_gets_a_bar_that_ends_full(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    assert list(track(range(4), "shard", total=4)) == [0, 1, 2, 3]
    last_line = screen.getvalue().rsplit("\r", 1)[-1]
    assert "shard" in last_line
    assert "4/4" in last_line


def test_the_closing_box_in_a_log_is_one_aligned_line_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    closing_box("trained", {"best": "val/loss 0.1", "in": "runs/x"}, next_command="shardline evaluate")
    assert capsys.readouterr().out == "trained\n  best  val/loss 0.1\n  in    runs/x\n  next  shardline evaluate\n"


def test_the_closing_box_on_a_terminal_shows_brackets_as_they_are(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    closing_box("trained", {"size": "[16, 16]"}, next_command="shardline train --preprocess.resize [bold]")
    shown = screen.getvalue()
    assert "╭─ trained ─" in shown
    assert "[16, 16]" in shown
    assert "--preprocess.resize [bold]" in shown


def test_a_table_in_a_log_is_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["split", "samples"], [["train", "1,200"], ["a long name", "7"]])
    assert capsys.readouterr().out == "split        samples\ntrain          1,200\na long name        7\n"


def test_a_table_on_a_terminal_shows_brackets_as_they_are(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    show_table(["[class]", "n"], [["[bold]", "7"]])
    assert "[class]" in screen.getvalue()
    assert "[bold]" in screen.getvalue()


def test_marked_sentences_in_a_log_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    show_marked([("problem", "bold red", "This is wrong."), ("note", "dim", "That is so.")])
    assert capsys.readouterr().out == "problem  This is wrong.\nnote     That is so.\n"


def test_marked_sentences_on_a_terminal_wrap_beside_their_mark(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    show_marked([("look", "yellow", f"{'word ' * 30}[end]")])
    first, second = screen.getvalue().rstrip("\n").splitlines()
    assert "look" in first
    assert second.startswith("      word")
    assert "[end]" in second
