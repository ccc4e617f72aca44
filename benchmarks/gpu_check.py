"""Does everything that needs an NVIDIA GPU work on this one?

    make gpu-check          # or: python benchmarks/gpu_check.py [--steps facts,kernels] [-o DIR]

Runs the tests marked ``gpu`` step by step, each within a time limit, and writes what passed, failed and was skipped,
with the reasons, to ``gpu-CARD.json`` and ``.md``. Without a GPU every step is listed as not run, with exit code 0;
with one, a step that fails or does not end makes it 1.
"""

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from results_file import options, publish, table

from medseg_trt.engines.gpu import Gpu, find_gpu
from medseg_trt.errors import UsageError

ROOT = Path(__file__).parents[1]
NO_GPU = "no CUDA device is here"
SHOWN_REASONS = 5
HEADER = ("step", "result", "passed", "failed", "skipped", "s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Some of the tests marked ``gpu``."""

    files: tuple[str, ...]
    timeout_s: int
    only: str = ""  # pytest's -k


STEPS: Mapping[str, Step] = {
    "facts": Step(files=("tests/kernels/test_gpu_facts.py", "tests/toolkit/bench/test_energy.py"), timeout_s=60),
    "kernels": Step(files=("tests/kernels/test_gpu.py",), timeout_s=420, only="not sanitizer"),
    "sessions": Step(files=("tests/toolkit/sessions/test_graphs_gpu.py",), timeout_s=420, only="onnx_runtime"),
    "pytorch": Step(files=("tests/toolkit/sessions/test_graphs_gpu.py",), timeout_s=600, only="pytorch"),
    "engines": Step(files=("tests/kernels/test_plugin_gpu.py", "tests/toolkit/sessions/test_gpu.py"), timeout_s=900),
    "sanitizers": Step(files=("tests/kernels/test_gpu.py",), timeout_s=900, only="sanitizer"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a step."""

    step: str
    result: str  # passed, failed, skipped or not run
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()  # of failures and skips, the most frequent first

    @property
    def is_bad(self) -> bool:
        """Whether the check as a whole fails."""
        return self.result == "failed"


def run_step(name: str, step: Step) -> Outcome:
    """Run the tests of a step; a step in which everything is skipped is skipped."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *step.files]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, *(["-k", step.only] if step.only else [])],
                cwd=ROOT,
                timeout=step.timeout_s,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"it did not end within {step.timeout_s} s"
            return Outcome(step=name, result="failed", failed=1, seconds=step.timeout_s, reasons=(reason,))
        seconds = time.perf_counter() - began
        if not report.is_file():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            return Outcome(step=name, result="failed", failed=1, seconds=seconds, reasons=tuple(last))
        return parse_report(name, report.read_text(encoding="utf-8"), seconds)


def parse_report(name: str, text: str, seconds: float) -> Outcome:
    """Read pytest's report in JUnit's form."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in ElementTree.fromstring(text).iter("testcase"):
        kinds = {child.tag: child.get("message") or "" for child in case}
        kind = "failed" if {"failure", "error"} & kinds.keys() else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        message = next(iter(kinds.values()), "") if kind != "passed" else ""
        if message:
            prefix = f"{case.get('name')}: " if kind == "failed" else ""
            reasons[prefix + " ".join(message.split())[:200]] += 1
    if not counts:
        return Outcome(step=name, result="failed", failed=1, seconds=seconds, reasons=("no test was collected",))
    result = "failed" if counts["failed"] else "passed" if counts["passed"] else "skipped"
    return Outcome(
        step=name,
        result=result,
        passed=counts["passed"],
        failed=counts["failed"],
        skipped=counts["skipped"],
        seconds=seconds,
        reasons=tuple(reason for reason, _ in reasons.most_common(SHOWN_REASONS)),
    )


def check(gpu: Gpu | None, names: Sequence[str]) -> list[Outcome]:
    """Run the steps in order, or none of them without a GPU."""
    if gpu is None:
        return [Outcome(step=name, result="not run", reasons=(NO_GPU,)) for name in names]
    outcomes: list[Outcome] = []
    for name in names:
        print(f"{name}: at most {STEPS[name].timeout_s} s", file=sys.stderr)
        outcomes.append(run_step(name, STEPS[name]))
    return outcomes


def page(result: Mapping[str, Any]) -> str:
    """Return the outcomes as Markdown."""
    rows = [
        (
            row["step"],
            row["result"],
            *(str(row[key]) for key in ("passed", "failed", "skipped")),
            f"{row['seconds']:.0f}",
        )
        for row in result["steps"]
    ]
    reasons = [f"- {row['step']}: {reason}" for row in result["steps"] for reason in row["reasons"]]
    return "\n".join([f"# {result['card']}", "", *table(HEADER, rows), "", *reasons])


def main() -> int:
    """Run the check and return the exit code."""
    parser = options(__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated, in this order")
    chosen = parser.parse_args()
    names = [name for name in STEPS if name in chosen.steps.split(",")]
    if unknown := sorted(set(chosen.steps.split(",")) - set(STEPS)):
        raise UsageError(f"--steps: there is no step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    gpu = find_gpu()
    outcomes = check(gpu, names)
    result = {"card": gpu.name if gpu else NO_GPU, "steps": [asdict(outcome) for outcome in outcomes]}
    if gpu is None:
        print(page(result))
        return 0
    card = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower().removeprefix("nvidia ")).strip("-")
    publish(f"gpu-{card}", result, page, chosen)
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
