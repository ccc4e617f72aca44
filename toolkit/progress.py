"""Show how far long work has come, on stderr; how much is shown follows the level of the ``medseg_trt`` logger.

WARNING (``-q``) shows nothing, INFO (the default of the command line) shows a bar, or a line now and then where stderr
is no terminal. Called from Python without any logging set up, nothing is shown.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from medseg_trt.plain_text import printable

Item = TypeVar("Item")

LOG = logging.getLogger("medseg_trt")
SECONDS_BETWEEN_LINES = 10.0


def is_main_process() -> bool:
    """Say whether this process speaks: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` while showing how many of them are done.

    Args:
        items: what to go through.
        label: what is being done, for example ``"infer"``.
        total: how many there are, where ``items`` has no length.
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


def _lines(items: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            LOG.info("%s: %d%s", label, count, f" of {total}" if total else "")
