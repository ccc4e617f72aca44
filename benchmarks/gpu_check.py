"""Does everything that needs an NVIDIA GPU work on this one?

    make gpu-check          # or: python benchmarks/gpu_check.py [--steps facts,kernels] [-o DIR]

Runs the tests marked ``gpu`` step by step, each within a time limit, and writes what passed, failed and was skipped,
with the reasons and the figures that tests recorded, to ``gpu-CARD.json`` and ``.md``: after every step, so that a
machine that is taken away leaves what it had. Steps of an earlier run on the same card stay in both until they are run
again. Without a GPU every step is listed as not run, with exit code 0; with one, a step that fails or does not end
makes it 1.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from results_file import options, publish, store, table

from medseg_trt.gpu import Gpu, find_gpu

ROOT = Path(__file__).parents[1]
NO_GPU = "no CUDA device is here"
SHOWN_REASONS = 5
REPORT_S = 10  # that a step which did not end in time has to write down what it did until then
ENDS = ("failure", "error", "skipped")  # elements of a test that did not pass; its figures come before them
HEADER = ("step", "result", "passed", "failed", "skipped", "s", "run")
FIGURES = ("step", "test", "figure", "value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Some of the tests marked ``gpu``."""

    files: tuple[str, ...]
    timeout_s: int
    only: str = ""  # pytest's -k


STEPS: Mapping[str, Step] = {  # limits are for a cold machine, on which nothing was read or compiled before
    # Seconds of work; but the first import of PyTorch reads gigabytes of CUDA libraries, which a slow disk takes more
    # than a minute for, and the driver may first have to wake the card.
    "facts": Step(files=("tests/kernels/test_gpu_facts.py", "tests/toolkit/bench/test_energy.py"), timeout_s=180),
    # Dozens of kernels are compiled by NVRTC, in about a second each, and by the driver.
    "kernels": Step(files=("tests/kernels/test_gpu.py",), timeout_s=420, only="not sanitizer"),
    # ONNX Runtime loads cuDNN and cuBLAS; its TensorRT providers build an engine for each session.
    "sessions": Step(files=("tests/toolkit/sessions/test_graphs_gpu.py",), timeout_s=420, only="onnx_runtime"),
    # Three forms of torch.compile compile for two sizes of batch each, a minute or two a time without a cache;
    # max-autotune also times every candidate kernel, which takes several minutes. Training is short.
    "pytorch": Step(
        files=("tests/train/test_train_gpu.py", "tests/toolkit/sessions/test_graphs_gpu.py"),
        timeout_s=1200,
        only="pytorch or test_a_run",
    ),
    # Engines are built in processes of their own, and the classic library times kernels while it builds.
    "engines": Step(files=("tests/kernels/test_plugin_gpu.py", "tests/toolkit/sessions/test_gpu.py"), timeout_s=900),
    # Under compute-sanitizer, a kernel runs tens of times as long.
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
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])  # by test
    run: str = ""  # when it began, in UTC; empty: it was not run

    @property
    def is_bad(self) -> bool:
        """Whether the check as a whole fails."""
        return self.result == "failed"


def run_step(name: str, step: Step) -> Outcome:
    """Run the tests of a step; a step in which everything is skipped is skipped."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *step.files]
        began = time.perf_counter()
        output = _bounded([*command, *(["-k", step.only] if step.only else [])], step.timeout_s)
        seconds = time.perf_counter() - began
        if output is None:
            before = _written(name, report, seconds)
            reasons = (f"it did not end within {step.timeout_s} s", *before.reasons)
            return replace(before, result="failed", failed=before.failed + 1, seconds=seconds, reasons=reasons, run=now)
        if not report.is_file():
            reasons = tuple(output.strip().splitlines()[-1:])
            return Outcome(step=name, result="failed", failed=1, seconds=seconds, reasons=reasons, run=now)
        return replace(parse_report(name, report.read_text(encoding="utf-8"), seconds), run=now)


def _written(name: str, report: Path, seconds: float) -> Outcome:
    """Read what a run that was ended has left of its report, which may be nothing."""
    try:
        root = ElementTree.fromstring(report.read_text(encoding="utf-8"))
        cases = [(suite, case) for suite in root.iter("testsuite") for case in suite.findall("testcase")]
        for suite, underway in cases[-1:]:
            suite.remove(underway)  # which is written as if it had passed
        if len(cases) > 1:
            return parse_report(name, ElementTree.tostring(root, encoding="unicode"), seconds)
    except (OSError, ElementTree.ParseError):
        pass
    return Outcome(step=name, result="failed")


def _bounded(command: Sequence[str], timeout_s: float) -> str | None:
    """Run a command and return what it printed; None: it was ended, with all processes that it had started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        return process.communicate(timeout=timeout_s)[0]
    except BaseException as error:  # an interrupt ends them, too: what is left would keep the GPU
        is_late = isinstance(error, subprocess.TimeoutExpired)
        if is_late:  # pytest writes its report when it is interrupted
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=REPORT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if is_late:
            return None
        raise


def parse_report(name: str, text: str, seconds: float) -> Outcome:
    """Read pytest's report in JUnit's form."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    figures: dict[str, dict[str, float]] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        kinds = {child.tag: child.get("message") or "" for child in case if child.tag in ENDS}
        recorded = {item.get("name", ""): float(item.get("value", "nan")) for item in case.iter("property")}
        if recorded:
            figures[case.get("name", "")] = recorded
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
        figures=figures,
    )


def check(gpu: Gpu | None, names: Sequence[str]) -> Iterator[Outcome]:
    """Run the steps in order, or none of them without a GPU."""
    for name in names:
        if gpu is None:
            yield Outcome(step=name, result="not run", reasons=(NO_GPU,))
        else:
            print(f"{name}: at most {STEPS[name].timeout_s} s", file=sys.stderr)
            yield run_step(name, STEPS[name])


def earlier_steps(path: Path, card: str) -> dict[str, dict[str, Any]]:
    """Return the steps of an earlier run on a card by name; none where there was no run, or its file is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {step["step"]: step for step in result["steps"]} if result["card"] == card else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def page(result: Mapping[str, Any]) -> str:
    """Return the outcomes as Markdown."""
    rows = [
        (
            row["step"],
            row["result"],
            *(str(row[key]) for key in ("passed", "failed", "skipped")),
            f"{row['seconds']:.0f}",
            row["run"] or "–",
        )
        for row in result["steps"]
    ]
    reasons = [f"- {row['step']}: {reason}" for row in result["steps"] for reason in row["reasons"]]
    figures = [
        (row["step"], test, name, f"{value:.4g}")
        for row in result["steps"]
        for test, recorded in row["figures"].items()
        for name, value in recorded.items()
    ]
    shown = ["", *table(FIGURES, figures)] if figures else []
    return "\n".join([f"# {result['card']}", "", *table(HEADER, rows), "", *reasons, *shown, ""])


def main() -> int:
    """Run the check and return the exit code."""
    parser = options(__doc__)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated, in this order")
    chosen = parser.parse_args()
    names = [name for name in STEPS if name in chosen.steps.split(",")]
    if unknown := sorted(set(chosen.steps.split(",")) - set(STEPS)):
        parser.error(f"--steps: there is no step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    gpu = find_gpu()
    if gpu is None:
        nothing = {"card": NO_GPU, "steps": [asdict(outcome) for outcome in check(None, names)]}
        if chosen.json:
            chosen.stdout.print(nothing)
        else:
            print(f"{page(nothing)}\nNo file was written. medseg-trt doctor says what is missing.")
        return 0
    card = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower().removeprefix("nvidia ")).strip("-")
    known = earlier_steps(chosen.output / f"gpu-{card}.json", gpu.name)
    failed = False
    result: dict[str, Any] = {"card": gpu.name, "steps": []}
    for outcome in check(gpu, names):
        failed |= outcome.is_bad
        known[outcome.step] = asdict(outcome)
        result["steps"] = [known[name] for name in STEPS if name in known]
        store(f"gpu-{card}", result, page, chosen.output)
    publish(f"gpu-{card}", result, page, chosen)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
