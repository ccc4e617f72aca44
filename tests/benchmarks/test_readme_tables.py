"""The tables of a README come from (generated) results, say where these were measured, and nothing else changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "readme_tables.py"
RESULT = {
    "measured": "2026-11-25T18:00:00+00:00",
    "machine": {"processor": "generated", "cores": 2, "load": 1.25, "system": "Linux", "python": "3.11.7"},
    "versions": {"numpy": "2.4.6"},
    "rows": [{"name": "medseg-trt infer | openvino", "typical_s": 1.234, "speed": 2.5}],
}
README = "# Title\n\n<!-- table cold_start -->\nold\n<!-- end cold_start -->\n\nText with | and <!-- a comment -->.\n"


def run(readme: Path, *further: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(readme), "--results", str(readme.parent), *further]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    (tmp_path / "cold_start.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path / "README.md"


def test_a_table_is_made_from_its_results(readme):
    assert run(readme, "--check").returncode == 1
    done = run(readme)
    assert done.returncode == 0, done.stderr
    assert readme.read_text(encoding="utf-8") == (
        "# Title\n\n<!-- table cold_start -->\n"
        "| from typing to the first mask | s | speed |\n| :-- | --: | --: |\n"
        "| medseg-trt infer \\| openvino | 1.23 | 2.50x |\n\n"
        "Measured 2026-11-25 on generated, 2 cores; load of the minute before 1.2; Linux, Python 3.11.7; numpy 2.4.6.\n"
        "<!-- end cold_start -->\n\nText with | and <!-- a comment -->.\n"
    )
    assert run(readme, "--check").returncode == 0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("table cold_start", "table colds_tart", "1 tables begin, but 0 end"),
        ("cold_start", "warm_start", "no table is called 'warm_start'; known are infer_pipeline"),
        ("cold_start", "scaling", "scaling.json does not exist; measure: python benchmarks/bench_scaling.py"),
    ],
)
def test_a_mark_that_cannot_be_filled_is_named_and_nothing_is_written(readme, before, after, words):
    text = README.replace(before, after)
    readme.write_text(text, encoding="utf-8")
    done = run(readme)
    assert done.returncode == 1
    assert words in done.stderr
    assert readme.read_text(encoding="utf-8") == text


def test_a_copy_of_this_readme_is_rewritten_from_the_stored_results(tmp_path):
    stored = [path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    names = [name for name in ("infer_pipeline", "cold_start", "inferers", "scaling", "aa") if name in stored]
    marks = "".join(f"\n<!-- table {name} -->\n<!-- end {name} -->\n" for name in names)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text + marks, encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert found.count("\nMeasured 20") >= len(names) > 0


def test_the_demos_table_is_made_from_a_report_of_bench(tmp_path):
    missing = {"reason": "generated"}
    row = {"name": "PyTorch", "size_mb": 27.2, "latency": {"model": {"median_ms": 76.8, "p90_ms": 86.81, "runs": 101}},
           "speedup": {"model": missing}, "agreement": {"max_abs_error": 1e-5, "labels": 1.0}}  # fmt: skip
    failed = {**row, "name": "int8", "latency": {"model": missing}, "agreement": missing}
    report = {**RESULT, "created": RESULT["measured"], "rows": [row, failed]}
    del report["measured"]
    (tmp_path / "organs-demo.json").write_text(json.dumps(report), encoding="utf-8")
    (tmp_path / "README.md").write_text("<!-- table organs-demo -->\n<!-- end organs-demo -->\n", encoding="utf-8")
    done = run(tmp_path / "README.md")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[3] == "| PyTorch | 76.80 | 86.81 | 101 | – | 1.0e-05 | 100.000% | 27.2 |"
    assert lines[4] == "| int8 | – | – | – | – | – | – | 27.2 |"
    assert lines[6].startswith("Measured 2026-11-25 on generated")
