"""Reserve stdout for one JSON object: with ``--json``, a program that reads stdout must find nothing else there.

Back-ends and their progress bars write to stdout from C++ and from child processes, so the file descriptor itself is
redirected to stderr while a command runs.
"""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol, cast, runtime_checkable

from medseg_trt.progress import unicode_text

STDOUT, STDERR = 1, 2


@runtime_checkable
class TextStream(Protocol):
    """The part of a text stream that is used; the streams of pytest have no ``mode``, so they are no ``TextIO``."""

    def write(self, text: str, /) -> int:
        """Write text and return its length."""
        ...

    def flush(self) -> None:
        """Write what is buffered."""

    def fileno(self) -> int:
        """Return the file descriptor."""
        ...


class JsonOutput:
    """Prints the one object of a command on its real stdout."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def print(self, result: Mapping[str, Any]) -> None:
        """Print the object; names that are not UTF-8 become valid Unicode, because some JSON readers refuse others."""
        self._stream.write(json.dumps(_valid(result), indent=2) + "\n")
        self._stream.flush()


@contextmanager
def only_json() -> Iterator[JsonOutput]:
    """Redirect stdout to stderr, except for the object that ``JsonOutput.print`` writes."""
    python_stdout = sys.stdout
    python_stdout.flush()
    try:
        saved = os.dup(STDOUT)
    except OSError:  # stdout is closed
        with redirect_stdout(sys.stderr):
            yield JsonOutput(python_stdout)
        return
    try:
        os.dup2(STDERR, STDOUT)
        stream = os.fdopen(os.dup(saved), "w", encoding="utf-8") if _is_descriptor(python_stdout) else python_stdout
        with redirect_stdout(sys.stderr):
            yield JsonOutput(stream)
    finally:
        sys.stdout.flush()
        os.dup2(saved, STDOUT)
        os.close(saved)


def _is_descriptor(stream: TextStream) -> bool:
    """Return whether a stream writes to descriptor 1; the replacements that tests install do not."""
    try:
        return stream.fileno() == STDOUT
    except (OSError, io.UnsupportedOperation, AttributeError):
        return False


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return unicode_text(value)
    if isinstance(value, Mapping):
        return {_valid(name): _valid(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in cast("Sequence[Any]", value)]
    return value
