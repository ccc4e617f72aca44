"""``make gpu-check`` runs every test that needs a GPU, and says what was not run and why."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medseg_trt.gpu import Gpu

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"pytest\.mark\.gpu(\n|\))")
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check: Any = importlib.import_module("gpu_check")
STEPS, Outcome, Step = gpu_check.STEPS, gpu_check.Outcome, gpu_check.Step
GPU = Gpu(name="NVIDIA H200", sm="sm90", cuda="13.0", driver="580.65")
REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="device_ms" value="1.25"/></properties></testcase>
<testcase name="b"><skipped message="TensorRT is not installed"/></testcase>
<testcase name="c"><skipped message="TensorRT is not installed"/></testcase>
<testcase name="d"><failure message="assert 2 &lt;= 1">long</failure></testcase>
<testcase name="e"><error message="setup">long</error></testcase>
</testsuite></testsuites>"""
# Stands in for a Python without them; and whoever opens a connection while tests are collected is caught.
WITHOUT = """
import socket, sys, pytest
missing = ("openvino", "cryptography")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"no {name}", name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
def refuse(*_):
    raise AssertionError("a network is asked for")
socket.socket.connect = refuse
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def gpu_files() -> set[str]:
    """Return the files with tests marked ``gpu``."""
    paths = (ROOT / "tests").rglob("test_*.py")
    return {str(path.relative_to(ROOT)) for path in paths if MARKED.search(path.read_text(encoding="utf-8"))}


def test_every_test_that_needs_a_gpu_belongs_to_a_step():
    assert gpu_files() == {name for step in STEPS.values() for name in step.files}


def test_steps_have_a_fixed_order_and_time_out_within_70_minutes():
    assert list(STEPS) == ["facts", "kernels", "sessions", "pytorch", "engines", "sanitizers"]
    assert sum(step.timeout_s for step in STEPS.values()) <= 70 * 60
    assert STEPS["facts"].timeout_s >= 120  # a cold import of PyTorch with CUDA takes more than a minute
    assert STEPS["pytorch"].timeout_s >= 900  # torch.compile with max-autotune takes minutes


def test_parse_report_counts_junit_outcomes_and_keeps_reasons_and_figures():
    outcome = gpu_check.parse_report("engines", REPORT, 2.0)
    assert (outcome.result, outcome.passed, outcome.failed, outcome.skipped) == ("failed", 1, 2, 2)
    assert outcome.reasons[0] == "TensorRT is not installed"
    assert "d: assert 2 <= 1" in outcome.reasons
    assert outcome.figures == {"a": {"device_ms": 1.25}}
    assert gpu_check.parse_report(
        "engines", REPORT.replace("failure", "system-out").replace("error", "system-out"), 1.0
    ).is_bad is (False)


def test_the_reason_of_a_failure_is_kept_where_figures_were_recorded_before():
    figure = '<properties><property name="share_of_copy" value="0.25"/></properties>'
    report = REPORT.replace('<testcase name="d">', f'<testcase name="d">{figure}')
    outcome = gpu_check.parse_report("kernels", report, 2.0)
    assert "d: assert 2 <= 1" in outcome.reasons
    assert outcome.figures["d"] == {"share_of_copy": 0.25}
    assert (outcome.passed, outcome.failed, outcome.skipped) == (1, 2, 2)


def test_without_a_gpu_every_step_is_listed_as_not_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "run_step", lambda *_: pytest.fail("a step was run"))
    assert gpu_check.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| not run |") == len(STEPS)
    assert gpu_check.NO_GPU in printed


@pytest.mark.parametrize(("results", "code"), [(["passed", "skipped"], 0), (["passed", "failed"], 1)])
def test_with_a_gpu_a_step_that_fails_makes_the_exit_code_1(results, code, monkeypatch, tmp_path):
    left = iter(results)
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: GPU)
    monkeypatch.setattr(gpu_check, "run_step", lambda name, _: Outcome(step=name, result=next(left), reasons=("why",)))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", "facts,kernels", "-o", str(tmp_path)])
    assert gpu_check.main() == code
    written = json.loads((tmp_path / "gpu-h200.json").read_text(encoding="utf-8"))
    assert [step["result"] for step in written["steps"]] == results
    assert "NVIDIA H200" in (tmp_path / "gpu-h200.md").read_text(encoding="utf-8")


def test_a_step_that_does_not_exist_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", "facts,foo"])
    with pytest.raises(SystemExit) as caught:
        gpu_check.main()
    assert caught.value.code == 2
    assert "there is no step foo; choose from facts, kernels" in capsys.readouterr().err


def test_without_a_gpu_json_is_one_object_and_no_file_is_written(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: None)
    command = ["gpu_check.py", "--steps", "facts", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_check.main() == 0
    assert "No file was written" in capfd.readouterr().out
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py", *command[1:], "--json"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (step,) = json.loads(ran.stdout)["steps"]
    assert (step["step"], step["result"]) == ("facts", "not run")
    assert list(tmp_path.iterdir()) == []


def steps_of(monkeypatch, tmp_path, results: dict[str, str], card: Gpu = GPU) -> dict[str, Any]:
    """Run some steps with these results, and return what is written then."""
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: card)
    monkeypatch.setattr(
        gpu_check, "run_step", lambda name, _: Outcome(step=name, result=results[name], figures={"t": {"ms": 2.5}})
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--steps", ",".join(results), "-o", str(tmp_path)])
    gpu_check.main()
    written = json.loads((tmp_path / "gpu-h200.json").read_text(encoding="utf-8"))
    return {step["step"]: step["result"] for step in written["steps"]}


def test_steps_of_an_earlier_run_on_the_same_card_stay_until_they_are_run_again(monkeypatch, tmp_path):
    assert steps_of(monkeypatch, tmp_path, {"kernels": "failed"}) == {"kernels": "failed"}
    both = {"facts": "passed", "kernels": "failed"}
    assert list(steps_of(monkeypatch, tmp_path, {"facts": "passed"}).items()) == list(both.items())
    assert steps_of(monkeypatch, tmp_path, {"kernels": "passed"}) == {"facts": "passed", "kernels": "passed"}
    assert "| kernels | t | ms | 2.5 |" in (tmp_path / "gpu-h200.md").read_text(encoding="utf-8")
    (tmp_path / "gpu-h200.json").write_text("{", encoding="utf-8")
    assert steps_of(monkeypatch, tmp_path, {"facts": "passed"}) == {"facts": "passed"}


def test_a_machine_that_is_taken_away_leaves_the_steps_before(monkeypatch, tmp_path):
    real = steps_of(monkeypatch, tmp_path, {"facts": "passed"})

    def taken_away(name, _):
        if name == "sessions":
            raise KeyboardInterrupt
        return Outcome(step=name, result="passed")

    monkeypatch.setattr(gpu_check, "run_step", taken_away)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "-o", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main()
    written = json.loads((tmp_path / "gpu-h200.json").read_text(encoding="utf-8"))
    assert [step["step"] for step in written["steps"]] == [*real, "kernels"]


def test_a_step_that_does_not_end_has_failed(monkeypatch):
    step = Step(files=("tests/kernels/test_gpu_facts.py",), timeout_s=0)
    outcome = gpu_check.run_step("facts", step)
    assert (outcome.result, outcome.is_bad) == ("failed", True)
    assert "did not end within 0 s" in outcome.reasons[0]


SLOW = """
import time, pytest

pytestmark = [pytest.mark.gpu]

def test_first(record_property):
    record_property("device_ms", 1.25)

def test_second():
    time.sleep(100)
"""


def test_a_step_that_does_not_end_keeps_what_passed_before(tmp_path):
    (tmp_path / "test_slow.py").write_text(SLOW)
    outcome = gpu_check.run_step("facts", Step(files=(str(tmp_path / "test_slow.py"),), timeout_s=20))
    assert (outcome.result, outcome.passed, outcome.is_bad) == ("failed", 1, True), outcome
    assert "did not end within 20 s" in outcome.reasons[0]
    assert outcome.figures == {"test_first": {"device_ms": 1.25}}


def test_a_step_that_does_not_end_takes_the_processes_that_it_started_along(tmp_path):
    """What is left would keep the GPU."""
    mark = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    began = time.monotonic()
    assert gpu_check._bounded([sys.executable, "-c", parent], 1.0) is None
    assert time.monotonic() - began < 3
    time.sleep(4)
    assert not mark.exists()


def test_a_step_that_cannot_be_collected_has_failed():
    outcome = gpu_check.run_step("facts", Step(files=("tests/nowhere.py",), timeout_s=120))
    assert outcome.is_bad, outcome


def test_page_shows_the_reason_of_every_step_without_a_gpu():
    outcomes = list(gpu_check.check(None, ["facts", "engines"]))
    text = gpu_check.page({"card": "none", "steps": [vars_of(outcome) for outcome in outcomes]})
    assert text.count(gpu_check.NO_GPU) == 2


def vars_of(outcome: Any) -> dict[str, object]:
    return {name: getattr(outcome, name) for name in Outcome.__slots__}


def test_collection_needs_no_network_no_openvino_and_no_cryptography():
    command = [sys.executable, "-c", WITHOUT, *sorted(gpu_files())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stdout[-2000:]
    assert "error" not in done.stdout.splitlines()[-1]
