"""Build an engine in a process of its own: a builder that dies takes nothing with it, and its memory is free again.

The child is ``python -m medseg_trt.engines.child``; it answers in lines of JSON on stdout.

The builder numbers and sorts by addresses and by which thread comes first, so that it would write another plan every
time. Therefore the child keeps to one core and to fixed addresses, its allocator to fixed rules, and it stands in a
folder where graph and plan have names of their own, whatever the folders that they are in are called.

Source: personality(2), mallopt(3) and glibc's manual, "Memory Allocation Tunables".
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from medseg_trt import errors
from medseg_trt.errors import ArtefactError, MedsegError
from medseg_trt.export.tensorrt.build import BuilderOutput, build_engine
from medseg_trt.progress import track
from medseg_trt.spec import EngineSpec, from_dict, to_dict

FIXED_ADDRESSES = 0x0040000  # ADDR_NO_RANDOMIZE of <sys/personality.h>
ASK = 0xFFFFFFFF
# Texts that hold a time come and go, now shorter and now longer; nothing may depend on where they lay. So freed blocks
# are not cached but melt into what is free beside them, and the thresholds do not follow what was freed before.
ALLOCATOR = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.trim_threshold=17179869184"
# So that no thread cuts another short: the first one, which needs root, allows none to; with the second, at least none
# that wakes up does. A builder takes seconds, and another core stays for everybody else.
POLICIES = ((os.SCHED_FIFO, 1), (os.SCHED_BATCH, 0)) if sys.platform == "linux" else ()
SHELL_STATE = ("PWD", "OLDPWD", "SHLVL", "_")  # where and how deep a shell stands
STATUS = Path("/proc/self/status")  # Linux


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a child made, and what it took."""

    built: BuilderOutput
    peak_resident_mb: float  # of the child; 0 where the system does not say
    wall_s: float  # from its start to its end
    processor_s: float  # that it used


def build_in_child(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None) -> Answer:
    """Build one engine while its progress is shown.

    Raises:
        MedsegError: as in ``build_engine``.
        ArtefactError: the child died; the message says by which signal.
    """
    request = {
        "graph": f"graph/{graph.name}", "plan": f"plan/{plan.name}", "spec": to_dict(spec),
        "cache": str(cache.resolve()) if cache else None,
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", "medseg_trt.engines.child", json.dumps(request)]
    began = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(
            command, cwd=_links(Path(folder), graph=graph, plan=plan), env=_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        last: dict[str, Any] = {}
        try:
            steps = _steps(process.stdout, last)
            total = next(steps, 0)
            for _ in track(steps, f"build {plan.name}", total):
                pass
        except BaseException:
            process.kill()
            raise
    if "error" in last:
        raise getattr(errors, last["kind"])(last["error"])
    if "built" not in last:
        code = process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = "; the machine may have run out of memory" if code == -9 else ""
        raise ArtefactError(f"the builder of {plan.name} {how}{hint}; no engine was written")
    built = from_dict(BuilderOutput, last["built"], "the builder")
    took = {name: last[name] for name in ("peak_resident_mb", "processor_s")}
    return Answer(built=built, wall_s=time.perf_counter() - began, **took)


def _links(folder: Path, **files: Path) -> Path:
    """Let a folder hold a link to the folder of each file, by its keyword."""
    for name, path in files.items():
        (folder / name).symlink_to(path.parent.resolve(), target_is_directory=True)
    return folder


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SHELL_STATE}
    return {**kept, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": ALLOCATOR}


def _steps(pipe: IO[bytes], last: dict[str, Any]) -> Iterator[int]:
    """Yield the number of steps of the outermost phase, then each step that is done; leave the outcome in ``last``."""
    outermost = None
    for line in pipe:
        message = json.loads(line)
        if "phase" not in message:
            last.update(message)
        elif outermost is None:
            outermost = message["phase"]
            yield message["of"]
        elif message["phase"] == outermost:
            yield message["done"]


def _settle() -> None:
    """Keep to one core, and start again with fixed addresses; where the system forbids that, go on without."""
    if not sys.platform.startswith("linux"):
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for policy, priority in POLICIES if (os.cpu_count() or 1) > 1 else ():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            break
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    now = personality(ASK)
    if now != -1 and not now & FIXED_ADDRESSES and personality(now | FIXED_ADDRESSES) != -1:
        os.execv(sys.executable, sys.orig_argv)


def _serve(request: dict[str, Any], answers: IO[bytes]) -> None:
    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    spec = from_dict(EngineSpec, request["spec"], "the request")
    cache = Path(request["cache"]) if request["cache"] else None
    try:
        built = build_engine(Path(request["graph"]), Path(request["plan"]), spec, _reporter(say), cache)
    except MedsegError as error:
        say({"error": str(error), "kind": type(error).__name__})
    else:
        took = {"peak_resident_mb": _peak_resident_mb(), "processor_s": time.process_time()}
        say({"built": to_dict(built), **took})


def _peak_resident_mb() -> float:
    """Return the most memory that this process had; getrusage would count what the parent had when it forked."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def _reporter(say: Callable[[dict[str, Any]], None]) -> Callable[[str, int, int], None]:
    return lambda phase, done, of: say({"phase": phase, "done": done, "of": of})


if __name__ == "__main__":
    _settle()
    own = os.fdopen(os.dup(1), "wb")  # a library that prints must not print into the answers
    os.dup2(2, 1)
    _serve(json.loads(sys.argv[1]), own)
