"""Build an engine in a process of its own: a builder that dies takes nothing with it, and its memory is free again.

The child is ``python -P -m medseg_trt.engines.child``; ``medseg_trt.processes`` describes the messages.

The builder numbers and sorts by addresses and by which thread comes first, so that it would write another plan every
time. Therefore the child keeps to one core and to fixed addresses, its allocator to fixed rules, and it stands in a
folder where graph and plan have names of their own, whatever the folders that they are in are called.

Source: personality(2), mallopt(3) and glibc's manual, "Memory Allocation Tunables".
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medseg_trt.export.tensorrt.build import BuilderOutput, build_engine
from medseg_trt.processes import ChildProcess, Connection, Progress, parent, process_memory
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
        ArtefactError: the child died; the message names the signal.
    """
    request = {
        "graph": f"graph/{graph.name}", "plan": f"plan/{plan.name}", "spec": to_dict(spec),
        "cache": str(cache.resolve()) if cache else None,
    }  # fmt: skip
    began = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        ChildProcess(
            "medseg_trt.engines.child",
            request,
            f"the builder of {plan.name}",
            consequence="no engine was written",
            cwd=_links(Path(folder), graph=graph, plan=plan),
            environment=_environment(),
        ) as child,
    ):
        steps = _outermost_steps(child.progress())
        total = next(steps, 0)
        for _ in track(steps, f"build {plan.name}", total):
            pass
        reply = child.receive()
        child.finish()
    built = from_dict(BuilderOutput, reply["built"], "the builder")
    usage = {name: reply[name] for name in ("peak_resident_mb", "processor_s")}
    return Answer(built=built, wall_s=time.perf_counter() - began, **usage)


def _links(folder: Path, **files: Path) -> Path:
    """Let a folder hold a link to the folder of each file, by its keyword."""
    for name, path in files.items():
        (folder / name).symlink_to(path.parent.resolve(), target_is_directory=True)
    return folder


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SHELL_STATE}
    return {**kept, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": ALLOCATOR}


def _outermost_steps(reports: Iterable[Progress]) -> Iterator[int]:
    """Yield the number of steps of the outermost phase, then each step that is done."""
    outermost = None
    for report in reports:
        if outermost is None:
            outermost = report.phase
            yield report.total
        elif report.phase == outermost:
            yield report.done


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


def _serve(request: Mapping[str, Any], connection: Connection) -> None:
    spec = from_dict(EngineSpec, request["spec"], "the request")
    cache = Path(request["cache"]) if request["cache"] else None
    built = build_engine(Path(request["graph"]), Path(request["plan"]), spec, connection.send_progress, cache)
    peak_resident_mb = process_memory().get("peak_resident_mb", 0.0)
    usage = {"peak_resident_mb": peak_resident_mb, "processor_s": time.process_time()}
    connection.send({"built": to_dict(built), **usage})


if __name__ == "__main__":
    _settle()
    with parent() as (opening, end):
        _serve(opening, end)
