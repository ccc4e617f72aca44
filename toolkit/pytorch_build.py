"""What the installed PyTorch was built for, read from its own file: importing PyTorch takes seconds."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

INSTALL = "install one for CUDA, see https://pytorch.org/get-started/locally"
VALUE = r"(?m)^{name}\b[^=\n]*= *'([^']*)'"  # None has no quotes


@dataclass(frozen=True, kw_only=True, slots=True)
class PyTorchBuild:
    """The installed PyTorch."""

    version: str
    cuda: str | None  # "13.0"; None: built without CUDA


def pytorch_build() -> PyTorchBuild | None:
    """Return what PyTorch was built for; None: it is not installed, or does not say."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    version, cuda = (re.search(VALUE.format(name=name), text) for name in ("__version__", "cuda"))
    return None if version is None else PyTorchBuild(version=version[1], cuda=cuda[1] if cuda else None)
