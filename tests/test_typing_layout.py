"""Type checkers see each module once, under the name that it is installed with, and strict where it is asked for."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typing_layout import lay_out

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
FOLDERS = {"toolkit": "", "train": "train", "export": "export", "kernels": "kernels"}  # folder: below medseg_trt


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the package's modules, with the project's own settings."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_module_is_there_once_under_its_installed_name(repository):
    layout = lay_out(repository)
    expected = {
        Path("medseg_trt", below, path.relative_to(repository / folder)): path
        for folder, below in FOLDERS.items()
        for path in (repository / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    files = {path.relative_to(layout) for path in layout.rglob("*") if not path.is_dir()}
    assert files == expected.keys()
    assert all((layout / name).samefile(path) for name, path in expected.items())


def test_folders_are_real_and_links_are_relative(repository):
    """A checker that follows a linked folder sees its modules twice; an absolute link breaks when the project moves."""
    layout = lay_out(repository)
    moved = repository.rename(repository.with_name("moved"))
    links = [path for path in (moved / layout.relative_to(repository)).rglob("*") if path.is_symlink()]
    assert links
    assert all(path.is_file() for path in links)


def test_a_deleted_module_leaves_no_link(repository):
    link = lay_out(repository) / "medseg_trt" / "spec.py"
    assert link.is_symlink()
    (repository / "toolkit" / "spec.py").unlink()
    lay_out(repository)
    assert not link.is_symlink()
    assert (repository / "toolkit" / "errors.py").is_file()  # the old links went, not what they pointed to


def test_settings_name_the_layout_and_only_files_that_exist(repository):
    pyright = SETTINGS["pyright"]
    lay_out(repository)
    assert "build/typing/medseg_trt" in pyright["include"]
    assert "build/typing" in pyright["extraPaths"]
    assert not {*FOLDERS} & {*pyright["include"]}  # each would be a second copy
    assert [name for name in pyright["strict"] if not (repository / name).exists()] == []


def test_a_planted_error_is_seen_and_strict_is_honoured(tmp_path):
    """``untyped`` is an error in strict files only; ``wrong`` is one everywhere."""
    untyped, wrong = "def first(values):\n    return values[0]\n", 'number: int = "text"\n'
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "toolkit" / "spec.py").write_text(untyped + wrong, encoding="utf-8")
    (tmp_path / "train" / "loop.py").write_text(untyped + wrong, encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lay_out(tmp_path)
    strict = ["build/typing/medseg_trt/spec.py"]
    assert set(strict) <= set(SETTINGS["pyright"]["strict"])
    config = {"include": ["build/typing/medseg_trt"], "strict": strict, "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = json.loads(done.stdout)["generalDiagnostics"]
    rules = {
        name: {error["rule"] for error in errors if error["file"].endswith(name)} for name in ("spec.py", "loop.py")
    }
    assert rules["loop.py"] == {"reportAssignmentType"}
    assert rules["spec.py"] > {"reportAssignmentType", "reportMissingParameterType"}
    assert [error["rule"] for error in errors].count("reportAssignmentType") == 2  # each file once
