"""Show progress on stderr, and convert text from outside, such as file names, to printable text.

The level of the ``medseg_trt`` logger sets how much is shown. WARNING (``-q``) shows nothing. INFO (the default of the
command line) shows a bar, or a line every 10 s where stderr is not a terminal. Without a log handler nothing is shown.

Python stores the bytes of a file name that are invalid in the file system's encoding as lone surrogates (PEP 383).
They cannot be encoded, and control characters move the cursor, colour the terminal or forge a line of a log.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LOG = logging.getLogger("medseg_trt")
SECONDS_BETWEEN_LINES = 10.0
# C0, DEL and C1 controls, line and paragraph separators, and characters that change the direction of writing
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def is_main_process() -> bool:
    """Return whether this is the only process, or rank 0 of those that torchrun started; it alone writes and logs."""
    return os.environ.get("RANK", "0") == "0"


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` and show how many of them are done.

    Args:
        items: any iterable; one item is taken at a time.
        label: the name of the task, for example ``"infer"``.
        total: the number of items, where ``items`` has no length.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]  # hasattr is not narrowed
    if not LOG.isEnabledFor(logging.INFO) or not LOG.hasHandlers():
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import track as rich_track

        shown = escape(printable(label))  # a file's name may look like rich's markup
        yield from rich_track(items, shown, total=total, console=Console(stderr=True), transient=True)
    else:
        yield from _lines(items, label, total)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, singular or plural."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that suits it: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def unicode_text(text: str) -> str:
    r"""Return valid Unicode: undecoded bytes are decoded as UTF-8; invalid ones are written as ``\xfc``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    r"""Return one line of valid Unicode, with control characters written as ``\n`` or ``\x1b``."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), unicode_text(text))


def _lines(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            LOG.info("%s: %d%s", label, count, f" of {total}" if total else "")
