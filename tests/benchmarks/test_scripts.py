"""Each stored result names the script that made it, and what the build machinery names exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
MAX_RESULT_BYTES = 64 << 10  # a table and its figures; single times of a measurement are not stored
WRITES = (r'publish\("{name}"', r'"{name}\.json"')
PRINTING = """
import os, subprocess, sys
sys.path.insert(0, {benchmarks!r})
from results_file import options, publish

chosen = options("").parse_args(["-o", {folder!r}, *sys.argv[1:]])
os.getloadavg = lambda: (99.0, 99.0, 99.0)  # what the benchmark itself causes
print("a progress bar")
os.write(1, b"a library\\n")
subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
publish("printed", {{"rows": []}}, lambda _: "page", chosen)
"""


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_stored_result_names_the_script_that_writes_it(path):
    script = ROOT / json.loads(path.read_text(encoding="utf-8"))["script"]
    text = script.read_text(encoding="utf-8")
    assert any(re.search(pattern.format(name=path.stem), text) for pattern in WRITES)


def test_every_table_says_a_command_whose_script_exists_and_writes_its_result():
    code = "import json, readme_tables; print(json.dumps({n: t.command for n, t in readme_tables.TABLES.items()}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    for name, command in json.loads(done.stdout).items():
        (script,) = [ROOT / word for word in command.split() if word.endswith(".py")]
        text = script.read_text(encoding="utf-8")
        assert any(re.search(pattern.format(name=name), text) for pattern in WRITES)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_stored_result_is_a_summary(path):
    assert path.stat().st_size <= MAX_RESULT_BYTES


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_child_process_of_a_benchmark_starts_without_the_current_folder(path):
    """``python_command`` adds ``-P``; where the interpreter is named, the option follows it."""
    text = path.read_text(encoding="utf-8")
    assert text.count("sys.executable") == len(re.findall(r'sys\.executable, "-P"', text))


def test_every_file_that_a_cache_key_hashes_exists():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    texts = [path.read_text(encoding="utf-8") for path in workflows]
    patterns = [pattern for text in texts for pattern in re.findall(r"hashFiles\('([^']+)'\)", text)]
    assert patterns
    for pattern in patterns:
        assert list(ROOT.glob(pattern)), pattern


def run(tmp_path: Path, *further: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "printed.py"
    program.write_text(PRINTING.format(benchmarks=str(BENCHMARKS), folder=str(tmp_path)), encoding="utf-8")
    return subprocess.run([sys.executable, str(program), *further], capture_output=True, text=True, check=True)


def test_json_option_prints_one_object_and_sends_other_output_to_stderr(tmp_path):
    done = run(tmp_path, "--json")
    assert json.loads(done.stdout)["script"] == "benchmarks/printed.py"
    assert {"a progress bar", "a library", "a child"} <= set(done.stderr.splitlines())
    assert json.loads((tmp_path / "printed.json").read_text(encoding="utf-8")) == json.loads(done.stdout)


def test_without_json_the_page_is_printed(tmp_path):
    assert "page" in run(tmp_path).stdout.splitlines()


def test_the_load_of_a_result_is_that_before_the_benchmark(tmp_path):
    run(tmp_path)
    assert json.loads((tmp_path / "printed.json").read_text(encoding="utf-8"))["machine"]["load"] != 99.0
