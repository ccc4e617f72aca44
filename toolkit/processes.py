"""Run a Python module in a child process, and exchange messages with it.

A message is one line of JSON; an array may follow, and the line gives its shape and type. The opening request is the
child's only argument. The child's stdout carries only its replies: output of libraries goes to stderr.

The child always starts with ``-P``, which keeps the current folder out of ``sys.path``, so that a file there with the
name of a package is not imported.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import IO, Any

import numpy as np
from numpy import ndarray

from medseg_trt import errors
from medseg_trt.errors import ArtefactError, MedsegError

STATUS = Path("/proc/self/status")  # Linux
FIELDS = {"anonymous_mb": "RssAnon", "resident_mb": "VmRSS", "peak_resident_mb": "VmHWM"}
STDERR_TAIL_BYTES = 4096  # in which the last line is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of a child."""

    phase: str
    done: int  # steps of the phase
    total: int


class Connection:
    """One end of the connection between a process and its child."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Mapping[str, Any], array: ndarray | None = None) -> None:
        """Send a message, followed by an array if one is given.

        Raises:
            BrokenPipeError: the other side has ended.
        """
        announced = {} if array is None else {"shape": array.shape, "dtype": array.dtype.name}
        self._writer.write(json.dumps({**message, **announced}).encode() + b"\n")
        if array is not None:
            self._writer.write(np.ascontiguousarray(array).data)
        self._writer.flush()

    def send_progress(self, phase: str, done: int, total: int) -> None:
        """Report progress; the reply follows later."""
        self.send({"phase": phase, "done": done, "total": total})

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if the other side has ended."""
        line = self._reader.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def receive_array(self, shape: Sequence[int], dtype: str) -> ndarray:
        """Return the array that follows a message.

        Raises:
            BrokenPipeError: the other side ended before it was complete.
        """
        array = np.empty(shape, dtype)
        memory = array.reshape(-1).view(np.uint8)
        if self._reader.readinto(memory) != array.nbytes:  # pyright: ignore[reportAttributeAccessIssue]  # buffered
            raise BrokenPipeError
        return array


class ChildProcess:
    """A module that runs in a child process; as a context manager, it ends the child.

    Args:
        module: the dotted name, or the path of a script.
        request: the opening request, which ``parent`` yields in the child.
        name: of the child, for messages.
        consequence: of its death, for messages.
        cwd: the folder that it starts in.
        environment: its environment variables.
        timeout_s: it is killed after so many seconds.
    """

    def __init__(
        self,
        module: str | Path,
        request: Mapping[str, Any],
        name: str,
        *,
        consequence: str = "it is not used",
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._name, self._consequence = name, consequence
        self._timeout_s, self._timed_out = timeout_s, False
        self._reply: dict[str, Any] | None = None  # that ended the progress
        self._stderr: IO[bytes] = TemporaryFile()  # noqa: SIM115  # closed with the child
        self._process = subprocess.Popen(
            python_command(module, json.dumps(request)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=cwd,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._connection = Connection(self._process.stdout, self._process.stdin)
        self._timer = Timer(timeout_s, self._expire) if timeout_s is not None else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_id(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def call(self, message: Mapping[str, Any], array: ndarray | None = None) -> dict[str, Any]:
        """Send a request and return the reply; see ``receive`` for what is raised."""
        try:
            self._connection.send(message, array)
        except BrokenPipeError:
            raise self._death() from None
        return self.receive()

    def call_for_array(self, message: Mapping[str, Any], array: ndarray) -> ndarray:
        """Send a request with an array and return the array of the reply; see ``receive`` for what is raised."""
        reply = self.call(message, array)
        try:
            return self._connection.receive_array(reply["shape"], reply["dtype"])
        except BrokenPipeError:
            raise self._death() from None

    def progress(self) -> Iterator[Progress]:
        """Yield the progress messages that precede the reply, which ``receive`` then returns."""
        while "phase" in (message := self.receive()):
            yield Progress(**message)
        self._reply = message

    def receive(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            MedsegError: the child raised it, of the same kind.
            ArtefactError: the child died or took too long; the message names the signal.
        """
        message, self._reply = self._reply or self._connection.receive(), None
        if message is None:
            raise self._death()
        if "error" in message:
            raise getattr(errors, message["kind"])(message["error"])
        return message

    def finish(self) -> None:
        """Close the child's input and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def close(self) -> None:
        """End the child."""
        if self._timer is not None:
            self._timer.cancel()
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            with suppress(BrokenPipeError):  # unsent bytes
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        self._process.wait()

    def _expire(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _death(self) -> ArtefactError:
        code = self._process.wait()
        if self._timed_out:
            cause = f"took more than {self._timeout_s:g} s"
        elif code < 0:
            hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
            cause = f"was killed by signal {-code} ({_signal_name(-code)}){hint}"
        else:
            last_line = self._last_line()
            cause = f"ended with exit code {code}" + (f" ({last_line})" if last_line else "")
        return ArtefactError(f"{self._name} {cause}; {self._consequence}")

    def _last_line(self) -> str:
        """Return the last line of the child's stderr, usually the exception."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL_BYTES))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


@contextmanager
def parent() -> Iterator[tuple[dict[str, Any], Connection]]:
    """In the child: yield the opening request and the connection; send a ``MedsegError`` to the parent."""
    writer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps output of libraries out of the replies
    connection = Connection(sys.stdin.buffer, writer)
    try:
        yield json.loads(sys.argv[1]), connection
    except MedsegError as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        connection.send({"error": str(error), "kind": kind.__name__})


def python_command(module: str | Path, *arguments: str) -> list[str]:
    """Return the command that runs a module, or a script, without the current folder in ``sys.path``."""
    target = [str(module)] if isinstance(module, Path) else ["-m", module]
    return [sys.executable, "-P", *target, *arguments]


def process_memory() -> dict[str, float]:
    """Return the memory of this process in 10^6 bytes by the keys of ``FIELDS``; empty without /proc.

    ``getrusage`` is not used: its peak includes the memory of the parent at the fork.
    """
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines()) if STATUS.is_file() else {}
    kilobytes = {name: lines[field].split()[0] for name, field in FIELDS.items() if field in lines}
    return {name: int(value) * 1024 / 1e6 for name, value in kilobytes.items()}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unnamed"
