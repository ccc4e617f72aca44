"""Build an engine in a child process, so that a crash of the builder is an error and its memory is freed.

The child is ``python -P -m medseg_trt.engines.child``; ``medseg_trt.processes`` describes the messages. Its working
folder has links to the folders of graph and plan, so that no path of this machine gets into the plan.

The builder's output depends on addresses and on the order of its threads: two builds of one graph differ in some
bytes. With ``EngineSpec.reproducible`` the child runs on one core at a fixed priority, with fixed addresses and a
deterministic allocator. It then blocks that core, needs root for the priority, and has no address randomisation, so
this is not the default.

Source: personality(2), sched(7), mallopt(3) and glibc's manual, "Memory Allocation Tunables".
"""

import contextlib
import ctypes
import json
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
QUERY = 0xFFFFFFFF  # reads the personality without changing it
# The builder allocates texts with times in them, whose lengths vary. Freed blocks are merged with their free neighbours
# instead of cached, and the thresholds are constant, so that later addresses do not depend on these lengths.
ALLOCATOR = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.trim_threshold=17179869184"
# Threads are not preempted: with SCHED_FIFO, which needs root, by none; with SCHED_BATCH not by threads that wake up.
POLICIES = ((os.SCHED_FIFO, 1), (os.SCHED_BATCH, 0)) if sys.platform == "linux" else ()
VISIBLE = "CUDA_VISIBLE_DEVICES"  # numbers or UUIDs, as CUDA counts them
SHELL_STATE = ("PWD", "OLDPWD", "SHLVL", "_")  # variables that differ between shells


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBuild:
    """The result of a child process, and its resources."""

    output: BuilderOutput
    peak_resident_mb: float  # of the child; 0 if the system does not report it
    wall_s: float  # from its start to its end
    processor_s: float  # CPU time of the child


def build_in_child(graph: Path, plan: Path, spec: EngineSpec, cache: Path | None, gpu_number: int = 0) -> EngineBuild:
    """Build one engine and show the progress.

    Args:
        graph: the graph.
        plan: the file to write.
        spec: how to build.
        cache: the timing cache; None: none.
        gpu_number: CUDA's number of the GPU, for a library that builds on one.

    Raises:
        MedsegError: as in ``build_engine``.
        ArtefactError: the child died; the message names the signal.
    """
    request = {
        "graph": f"graph/{graph.name}",
        "plan": f"plan/{plan.name}",
        "spec": to_dict(spec),
        "cache": str(cache.resolve()) if cache else None,
    }
    began = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        ChildProcess(
            "medseg_trt.engines.child",
            request,
            f"the builder of {plan.name}",
            consequence="no engine was written",
            cwd=_links(Path(folder), graph=graph, plan=plan),
            environment=child_environment(spec, gpu_number),
        ) as child,
    ):
        steps = _outermost_steps(child.progress())
        total = next(steps, 0)
        for _ in track(steps, f"build {plan.name}", total):
            pass
        reply = child.receive()
        child.finish()
    return EngineBuild(
        output=from_dict(BuilderOutput, reply["built"], "the builder"),
        peak_resident_mb=reply["peak_resident_mb"],
        wall_s=time.perf_counter() - began,
        processor_s=reply["processor_s"],
    )


def _links(folder: Path, **files: Path) -> Path:
    """Create links in a folder to the folders of files, named by their keywords."""
    for name, path in files.items():
        (folder / name).symlink_to(path.parent.resolve(), target_is_directory=True)
    return folder


def child_environment(spec: EngineSpec, gpu_number: int = 0) -> dict[str, str]:
    """Return the environment variables of the child, which sees the GPU of this number alone, unless it is the first.

    TensorRT builds on the current device of CUDA's runtime, the first that the process sees.
    """
    variables = dict(os.environ)
    if gpu_number:
        visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
        variables[VISIBLE] = visible[gpu_number] if visible else str(gpu_number)
    if not spec.reproducible:
        return variables
    kept = {name: value for name, value in variables.items() if name not in SHELL_STATE}
    return {**kept, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": ALLOCATOR}


def _outermost_steps(reports: Iterable[Progress]) -> Iterator[int]:
    """Yield the number of steps of the outermost phase, then the number of finished steps."""
    outermost = None
    for report in reports:
        if outermost is None:
            outermost = report.phase
            yield report.total
        elif report.phase == outermost:
            yield report.done


def prepare_process(spec: EngineSpec) -> None:
    """For a reproducible engine, restrict this process to one core and restart it with fixed addresses.

    What the system does not permit is left out: then the plans of two builds may differ.
    """
    if not spec.reproducible or not sys.platform.startswith("linux"):
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for policy, priority in POLICIES if (os.cpu_count() or 1) > 1 else ():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            break
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    current = personality(QUERY)
    if current != -1 and not current & FIXED_ADDRESSES and personality(current | FIXED_ADDRESSES) != -1:
        os.execv(sys.executable, sys.orig_argv)


def _serve(request: Mapping[str, Any], spec: EngineSpec, connection: Connection) -> None:
    cache = Path(request["cache"]) if request["cache"] else None
    built = build_engine(Path(request["graph"]), Path(request["plan"]), spec, connection.send_progress, cache)
    peak_resident_mb = process_memory().get("peak_resident_mb", 0.0)
    usage = {"peak_resident_mb": peak_resident_mb, "processor_s": time.process_time()}
    connection.send({"built": to_dict(built), **usage})


def main() -> None:
    """Build the engine that the parent requests."""
    spec = from_dict(EngineSpec, json.loads(sys.argv[1])["spec"], "the request")
    prepare_process(spec)  # may restart the process, so it precedes any message
    with parent() as (request, connection):
        _serve(request, spec, connection)


if __name__ == "__main__":
    main()
