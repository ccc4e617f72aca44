"""What the Makefile, ``.ci/run`` and the workflows name is there; every dependency's lowest version is tested."""

import re
import subprocess
from pathlib import Path

import lowest_versions
import pytest

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
WORKFLOWS = [name for name in LISTED if name.startswith(".github/workflows/")]
SCRIPTS = ("Makefile", ".ci/run", ".pre-commit-config.yaml", *WORKFLOWS)
MADE = (".venv", ".venv-lowest", ".venv-audit", "build", "demo", "dist", "empty")  # made by make or a workflow
TARGETS = re.compile(r"^make (?:--\S+ )*([\w -]+) \|\||target: \[(.*)\]|- run: make ([\w-]+)", re.MULTILINE)
SUFFIXES = (".py", ".toml", ".txt", ".md")


def missing_paths(text: str) -> list[str]:
    """Return the paths of a script that lead nowhere; what follows a variable is no whole path."""
    words = {word for word in re.split(r"[\s'\"()=,;>]+", text) if "/" in word or word.endswith(SUFFIXES)}
    paths = {word for word in words if word[0] not in "/#~." or word.startswith(".github")}
    return sorted(
        path for path in paths if "@" not in path and path.split("/")[0] not in MADE and not any(ROOT.glob(path))
    )


def missing_modules(text: str) -> list[str]:
    """Return the modules that a script runs in the folder tests and that are not there."""
    paths = {name: ROOT / "tests" / name.replace(".", "/") for name in re.findall(r"cd tests && .* -m ([\w.]+)", text)}
    return sorted(
        name
        for name, path in paths.items()
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())
    )


def missing_targets(text: str) -> list[str]:
    """Return the targets that a script makes and the Makefile lacks."""
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(
        {name for words in TARGETS.findall(text) for name in re.findall(r"[\w-]+", " ".join(words))} - targets
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_path_module_and_target_of_a_script_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert (missing_paths(text), missing_modules(text), missing_targets(text)) == ([], [], [])


def test_a_path_a_module_and_a_target_that_are_not_there_are_found():
    assert missing_paths("pytest tests/nowhere toolkit/cli.py; key: hashFiles('toolkit/samples.py')") == [
        "tests/nowhere",
        "toolkit/samples.py",
    ]
    assert missing_modules("\tcd tests && ../$(BIN)/python -m gpu_free.nowhere\n") == ["gpu_free.nowhere"]
    assert missing_targets("make --jobs=2 lint typos || status=1") == ["typos"]
    assert missing_targets("      - run: make tests PYTHON=python") == ["tests"]


def test_every_check_of_a_change_has_a_workflow():
    lists = TARGETS.findall((ROOT / ".ci/run").read_text(encoding="utf-8"))
    checks = [name for words in lists for name in " ".join(words).split()]
    assert len(checks) == 4
    workflows = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in WORKFLOWS)
    assert [name for name in checks if not re.search(rf"(make |\[.*\b){name}\b", workflows)] == []


def test_every_dependency_is_exercised_in_its_lowest_version():
    assert lowest_versions.dependencies() == set(lowest_versions.EXERCISED_BY)
    named = {module for modules in lowest_versions.EXERCISED_BY.values() for module in modules}
    assert [module for module in sorted(named) if not lowest_versions.files(module)] == []
