"""What PyTorch was built for is read without importing it, and is what PyTorch says itself."""

import importlib.util
from types import SimpleNamespace

import pytest

from medseg_trt.pytorch_build import PyTorchBuild, pytorch_build


def test_the_file_says_what_pytorch_says():
    torch = pytest.importorskip("torch")
    assert pytorch_build() == PyTorchBuild(version=str(torch.__version__), cuda=torch.version.cuda)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        (
            "__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
            PyTorchBuild(version="2.13.0+cu130", cuda="13.0"),
        ),
        ("__version__ = '2.10.0'\ncuda = '12.8'\n", PyTorchBuild(version="2.10.0", cuda="12.8")),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", PyTorchBuild(version="2.13.0+cpu", cuda=None)),
        ("nothing = 1\n", None),
        (None, None),
    ],
)
def test_builds_are_told_apart(text, build, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert pytorch_build() == build


def test_without_pytorch_there_is_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pytorch_build() is None
