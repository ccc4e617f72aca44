"""An interrupt names the command line that goes on, and only where there is something to go on from."""

import click
import pytest

from medseg_trt.commands.interrupts import interrupt_text, resumable


def text_of(monkeypatch, finished: str | None) -> str:
    monkeypatch.setattr("sys.argv", ["medseg-trt", "infer", "my images", "--continue"])
    with pytest.raises(KeyboardInterrupt) as stopped, resumable("--continue", lambda: finished):
        raise KeyboardInterrupt
    abort = click.Abort()
    abort.__cause__ = stopped.value
    assert interrupt_text(abort) == interrupt_text(stopped.value)
    return interrupt_text(abort)


def test_interrupt_message_gives_progress_and_the_continue_command(monkeypatch):
    line = text_of(monkeypatch, "21 of 151 images done")
    assert line == "interrupted: 21 of 151 images done; go on with: medseg-trt infer 'my images' --continue"


def test_interrupt_message_without_progress_gives_no_command(monkeypatch):
    assert text_of(monkeypatch, None) == "interrupted"
