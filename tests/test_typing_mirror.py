"""``.typing/medseg_trt`` shows the package to type checkers as the wheel lays it out: one relative link a module."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("train", "export", "kernels")


def expected_links(root: Path) -> dict[str, str]:
    """Return what each link must point to; packages are linked whole."""
    modules = [path.name for path in (root / "toolkit").glob("*.py")] + ["py.typed"]
    packages = [path.parent.name for path in (root / "toolkit").glob("*/__init__.py")]
    return {
        **{name: f"../../toolkit/{name}" for name in sorted(modules + packages)},
        **{name: f"../../{name}" for name in PACKAGES},
    }


def repairs(root: Path) -> list[str]:
    """Return the shell commands that make the mirror complete; none if it is."""
    mirror = root / ".typing" / "medseg_trt"
    expected = expected_links(root)
    found = {path.name: os.readlink(path) if path.is_symlink() else None for path in mirror.iterdir()}
    stale = [f"rm -r .typing/medseg_trt/{name}" for name in sorted(found) if found[name] != expected.get(name)]
    missing = [
        f"ln -s {target} .typing/medseg_trt/{name}" for name, target in expected.items() if found.get(name) != target
    ]
    return stale + missing


def test_the_mirror_is_complete():
    commands = repairs(ROOT)
    assert not commands, "run this in the repository's root:\n" + "\n".join(commands)


def test_every_module_is_reached_through_the_mirror():
    mirror = ROOT / ".typing" / "medseg_trt"
    for package in ("toolkit", *PACKAGES):
        for path in (ROOT / package).rglob("*.py"):
            below = path.relative_to(ROOT / package if package == "toolkit" else ROOT)
            assert (mirror / below).samefile(path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two modules and a sub-package, with a complete mirror."""
    for name in ("toolkit", "toolkit/sessions", *PACKAGES, ".typing/medseg_trt"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("__init__.py", "spec.py", "py.typed", "sessions/__init__.py"):
        (tmp_path / "toolkit" / name).touch()
    for name, target in expected_links(tmp_path).items():
        (tmp_path / ".typing/medseg_trt" / name).symlink_to(target)
    return tmp_path


def test_a_new_module_and_a_new_package_are_asked_for(repository):
    assert repairs(repository) == []
    (repository / "toolkit/files.py").touch()
    (repository / "toolkit/engines").mkdir()
    (repository / "toolkit/engines/__init__.py").touch()
    assert repairs(repository) == [
        "ln -s ../../toolkit/engines .typing/medseg_trt/engines",
        "ln -s ../../toolkit/files.py .typing/medseg_trt/files.py",
    ]


def test_a_link_to_a_deleted_module_is_to_be_removed(repository):
    (repository / "toolkit/spec.py").unlink()
    assert repairs(repository) == ["rm -r .typing/medseg_trt/spec.py"]


def test_an_absolute_link_and_a_copy_are_to_be_replaced(repository):
    mirror = repository / ".typing/medseg_trt"
    (mirror / "spec.py").unlink()
    (mirror / "spec.py").symlink_to(repository / "toolkit/spec.py")
    (mirror / "train").unlink()
    shutil.copytree(repository / "train", mirror / "train")
    assert repairs(repository) == [
        "rm -r .typing/medseg_trt/spec.py",
        "rm -r .typing/medseg_trt/train",
        "ln -s ../../toolkit/spec.py .typing/medseg_trt/spec.py",
        "ln -s ../../train .typing/medseg_trt/train",
    ]
