"""Say after an interrupt what is finished, and with which command line a run goes on."""

import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def resumable(option: str, finished: Callable[[], str | None]) -> Generator[None, None, None]:
    """Add to an interrupt what is finished, and the command line that goes on.

    Args:
        option: of the command, which makes it go on.
        finished: says what is finished; None: nothing that a run could go on from.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        text = finished()
        if text is None:
            raise
        arguments = [word for word in sys.argv[1:] if word != option]
        line = shlex.join(["medseg-trt", *arguments, option])
        raise KeyboardInterrupt(f"{text}; go on with: {line}") from stop


def interrupt_text(error: BaseException) -> str:
    """Return the line of an interrupt; Click wraps it into an ``Abort``."""
    stop = error if isinstance(error, KeyboardInterrupt) else error.__cause__
    reason = stop.args[0] if isinstance(stop, KeyboardInterrupt) and stop.args else ""
    return f"interrupted: {reason}" if reason else "interrupted"
