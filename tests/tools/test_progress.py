"""Progress on standard error: a bar on a terminal, a line a minute elsewhere, nothing of short work."""

import sys

import pytest

from kdfast import _progress
from kdfast._progress import Progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(_progress.time, "monotonic", lambda: Clock.now)
    return Clock


def work(clock, seconds, steps=4, **options):
    with Progress("capture", unit="batches", **options) as bar:
        for step in range(steps):
            clock.now += seconds
            bar.advance(note=f"{10 * (step + 1)} rows/s")


def test_without_a_terminal_there_is_a_line_a_minute_and_the_end(clock, capsys):
    work(clock, 40.0, total=4)
    assert capsys.readouterr().err.splitlines() == [
        "capture: 2/4 batches, 20 rows/s, after 0:01:20, 0:01:20 left",
        "capture: 4/4 batches, 40 rows/s, after 0:02:40",
        "capture: 4/4 batches, 40 rows/s, after 0:02:40",
    ]


def test_a_stream_s_lines_lack_a_total_and_what_is_left(clock, capsys):
    work(clock, 60.0, steps=1)
    assert capsys.readouterr().err.splitlines()[0] == "capture: 1 batches, 10 rows/s, after 0:01:00"


def test_what_is_left_does_not_count_what_was_done_before(clock, capsys):
    work(clock, 60.0, steps=1, total=12, initial=9)
    assert "10/12 batches, 10 rows/s, after 0:01:00, 0:02:00 left" in capsys.readouterr().err


def test_short_work_and_progress_that_is_not_wanted_show_nothing(clock, capsys):
    work(clock, 1.0, total=4)
    work(clock, 100.0, total=4, shown=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_terminals_and_notebooks_have_a_bar(monkeypatch, capsys, where):
    if where == "terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    else:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with Progress("capture", total=2, unit="batches") as bar:
        bar.advance(note="7 rows/s")
        bar.advance(note="8 rows/s")
    shown = capsys.readouterr().err
    assert "2/2 batches" in shown
    assert "8 rows/s" in shown
