"""The tables of a README come from (generated) results, say where these were measured, and nothing else changes."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        ("cold_start", "warm_start", "no table is called 'warm_start'; known are cold_start"),
        ("cold_start", "engines", "engines.json does not exist; measure: python benchmarks/bench_engine.py"),
    ],
)
def test_invalid_table_marker_is_reported_and_the_readme_is_unchanged(readme, before, after, words):
    text = README.replace(before, after)
    readme.write_text(text, encoding="utf-8")
    done = run(readme)
    assert done.returncode == 1
    assert words in done.stderr
    assert readme.read_text(encoding="utf-8") == text


def test_the_tables_of_the_readmes_are_those_of_the_stored_results():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def script(monkeypatch) -> dict[str, Any]:
    """The names of the script."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return runpy.run_path(str(SCRIPT))


def test_every_marked_readme_is_in_the_list_and_every_table_in_a_readme(script):
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in listed.stdout.splitlines()}
    marked = {name: script["MARK"].findall(text) for name, text in texts.items() if "<!-- table " in text}
    assert sorted(marked) == sorted(script["README_FILES"])
    assert sorted(name for tables in marked.values() for name, _ in tables) == sorted(script["TABLES"])


def test_the_command_of_every_table_names_a_script_that_exists(script):
    scripts = [word for table in script["TABLES"].values() for word in table.command.split() if ".py" in word]
    assert scripts
    assert [path for path in scripts if not (ROOT / path).is_file()] == []


def test_no_readme_is_written_where_one_has_a_fault(readme, tmp_path):
    bad = tmp_path / "OTHER.md"
    bad.write_text(README.replace("end cold_start", "end"), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(readme), str(bad), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert readme.read_text(encoding="utf-8") == README


def test_the_demos_table_is_made_from_a_report_of_bench(tmp_path):
    missing = {"reason": "generated"}
    row = {
        "name": "PyTorch",
        "size_mb": 27.2,
        "latency": {"model": {"median_ms": 76.8, "p90_ms": 86.81, "runs": 101}},
        "speedup": {"model": missing},
        "agreement": {"max_abs_error": 1e-5, "labels": 1.0},
    }
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
