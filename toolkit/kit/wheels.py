"""Collect the wheels of a kit with pip, run by the Python that they are for."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medseg_trt.errors import UsageError
from medseg_trt.kit.given import constrained, given_versions, write_stub
from medseg_trt.kit.interpreter import Interpreter
from medseg_trt.kit.spec import normalised
from medseg_trt.kit.wheel_file import Wheel, read_wheel
from medseg_trt.samples.catalogue import run_pip

NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelRequest:
    """Which wheels to collect."""

    interpreter: Interpreter
    requirements: tuple[str, ...]  # as pip's command line takes them
    constraints: Path
    given: tuple[str, ...]
    cuda_torch: bool


def build_wheel(interpreter: Interpreter, source: Path, folder: Path) -> Path:
    """Build the wheel of a source folder and return its path.

    Raises:
        DownloadError: pip could not build it; the message has pip's reason.
    """
    _run(interpreter, ["wheel", "--no-deps", f"--wheel-dir={folder}", str(source)], "the build of medseg-trt's wheel")
    (wheel,) = folder.glob("medseg_trt-*.whl")
    return wheel


def collect_wheels(request: WheelRequest, folder: Path) -> tuple[Wheel, ...]:
    """Write the wheels of all requirements and of what they depend on, except those that are given.

    Source packages are built here, so that the target machine needs no compiler.

    Raises:
        UsageError: a given package has no known version, or pip chose a PyTorch that brings CUDA along.
        NetworkError, DownloadError: pip could not fetch or build a package; the message has pip's reason.
    """
    with TemporaryDirectory(prefix="medseg-trt-") as private:
        stubs = Path(private, "given")
        stubs.mkdir()
        constraints = Path(private, "constraints.txt")
        lines = request.constraints.read_text(encoding="utf-8").splitlines()
        given = given_versions(request.given, lines)
        constraints.write_text("\n".join(constrained(lines, given)) + "\n", encoding="utf-8")
        for name, version in given.items():
            write_stub(stubs, name, version)
        options = [f"--constraint={constraints}", f"--find-links={stubs}", "--prefer-binary", *request.requirements]
        report = Path(private, "report.json")
        dry_run = ["install", "--dry-run", "--ignore-installed", f"--report={report}", *options]
        _run(request.interpreter, dry_run, "the packages of the kit")
        if not request.cuda_torch:
            refuse_cuda_torch(json.loads(report.read_text(encoding="utf-8"))["install"])
        _run(request.interpreter, ["wheel", f"--wheel-dir={folder}", *options], "the packages of the kit")
    wheels = [read_wheel(path) for path in sorted(folder.glob("*.whl"))]
    for wheel in wheels:
        if normalised(wheel.name) in given:
            (folder / wheel.file).unlink()
    return tuple(wheel for wheel in wheels if normalised(wheel.name) not in given)


def refuse_cuda_torch(chosen: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a PyTorch whose CUDA libraries pip chose too: they are gigabytes.

    Args:
        chosen: ``install`` of pip's report. Source: PyPA, pip installation report, version 1.

    Raises:
        UsageError: it is one.
    """
    packages = {normalised(entry["metadata"]["name"]): entry["metadata"] for entry in chosen}
    torch = packages.get("torch", {})
    required = {normalised(match[0]) for line in torch.get("requires_dist", ()) if (match := NAME.match(line))}
    if cuda := sorted(name for name in required & packages.keys() if name.startswith("nvidia-")):
        raise UsageError(
            f"pip chose torch {torch['version']} with CUDA ({', '.join(cuda[:2])} …), which takes gigabytes. "
            "Set pip to a CPU build (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), leave PyTorch out with --given torch, "
            "or take it: --cuda-torch"
        )


def _run(interpreter: Interpreter, arguments: Sequence[str], requested: str) -> None:
    run_pip([f"--python={interpreter.path}", *arguments], requested, None)
