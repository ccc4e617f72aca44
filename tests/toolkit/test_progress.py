"""Progress goes to stderr, only if it was asked for, and never changes what is gone through."""

import logging
import subprocess
import sys
from io import StringIO

import pytest

from medseg_trt import progress
from medseg_trt.progress import LOG, track


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lines(monkeypatch):
    """Let only one handler of our own hear what is logged, and show a line after every item."""
    stream = StringIO()
    monkeypatch.setattr(LOG, "handlers", [logging.StreamHandler(stream)])
    monkeypatch.setattr(LOG, "propagate", False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    level = LOG.level
    LOG.setLevel(logging.INFO)
    yield stream
    LOG.setLevel(level)


def set_stderr(monkeypatch, stream: StringIO) -> StringIO:
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_lines_are_shown_where_stderr_is_no_terminal(lines, monkeypatch):
    stderr = set_stderr(monkeypatch, StringIO())
    assert list(track("abc", "infer")) == ["a", "b", "c"]
    assert lines.getvalue().splitlines() == ["infer: 1 of 3", "infer: 2 of 3", "infer: 3 of 3"]
    assert not stderr.getvalue()


def test_progress_lines_are_rate_limited(lines, monkeypatch):
    set_stderr(monkeypatch, StringIO())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 10.0)
    clock = iter(range(0, 1000, 4))  # every look at it is 4 s later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(track(range(9), "train")) == list(range(9))
    shown = lines.getvalue().splitlines()
    assert 1 < len(shown) < 5
    assert shown[0] == "train: 3 of 9"


@pytest.mark.parametrize(("total", "line"), [(None, "infer: 1"), (2, "infer: 1 of 2")])
def test_progress_of_an_iterator_shows_a_total_only_if_given(total, line, lines, monkeypatch):
    set_stderr(monkeypatch, StringIO())
    assert list(track((item for item in "ab"), "infer", total)) == ["a", "b"]
    assert lines.getvalue().splitlines()[0] == line


def test_a_bar_is_shown_on_a_terminal(lines, monkeypatch, capsys):
    terminal = set_stderr(monkeypatch, Terminal())
    assert list(track("abc", "infer")) == ["a", "b", "c"]
    assert "infer" in terminal.getvalue()
    assert not lines.getvalue()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("stream", [StringIO, Terminal])
def test_progress_is_hidden_at_log_level_warning(stream, lines, monkeypatch):
    stderr = set_stderr(monkeypatch, stream())
    LOG.setLevel(logging.WARNING)
    assert list(track("abc", "infer")) == ["a", "b", "c"]
    assert not lines.getvalue()
    assert not stderr.getvalue()


def test_progress_is_hidden_without_a_log_handler(lines, monkeypatch):
    terminal = set_stderr(monkeypatch, Terminal())
    monkeypatch.setattr(LOG, "handlers", [])
    assert list(track("abc", "infer")) == ["a", "b", "c"]
    assert not terminal.getvalue()


def test_progress_is_hidden_in_programs_without_logging_setup():
    program = (
        "import sys; sys.stderr.isatty = lambda: True\n"
        "from medseg_trt import progress; progress.SECONDS_BETWEEN_LINES = 0\n"
        "print(list(progress.track(range(3), 'infer')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "")


def test_progress_takes_items_lazily(lines, monkeypatch):
    set_stderr(monkeypatch, StringIO())
    taken = []

    def items():
        for item in range(5):
            taken.append(item)
            yield item

    tracked = track(items(), "infer")
    assert not taken
    assert next(tracked) == 0
    assert taken == [0]
