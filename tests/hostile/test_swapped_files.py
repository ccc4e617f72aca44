"""A file that is swapped between the check of a bundle and its use is not used.

Each swap is one that a second process can make: the file is replaced by another, or written to in place. Before files
were verified at their use, the swapped graph and weights ran as the verified ones.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from stored_bundle import GRAPH, PLAIN_GRAPH, WEIGHTS, rehash, stored_bundle

from medseg_trt.bundles import verified_files
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError
from medseg_trt.sessions.open import open_session

FILES = {"onnxruntime": (GRAPH, WEIGHTS, "golden.npz"), "openvino": (PLAIN_GRAPH, WEIGHTS, "golden.npz")}
CASES = [(backend, name) for backend, names in FILES.items() for name in names]


def replaced(path: Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


def overwritten(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def other_content(path: Path) -> bytes:
    """Return content that a reader takes: a graph with another constant, or bytes of the same length."""
    if path.suffix == ".onnx":
        model = onnx.load(path, load_external_data=False)
        model.producer_name = "someone"
        return model.SerializeToString()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


@pytest.mark.parametrize("swap", [replaced, overwritten])
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_a_file_that_is_swapped_after_the_check_is_refused(
    tmp_path, backend, name, swap: Callable[[Path, bytes], None]
):
    folder = stored_bundle(tmp_path)
    bundle = load_bundle(folder)
    swap(folder / name, other_content(folder / name))
    with pytest.raises(ArtefactError, match=rf"{name} is not what manifest\.json says"):
        open_session(bundle, backend, threads=1)


@pytest.mark.parametrize("backend", FILES)
def test_overwriting_bundle_files_does_not_change_an_open_session(tmp_path, backend):
    folder = stored_bundle(tmp_path)
    bundle = load_bundle(folder)
    image, expected = bundle.golden()
    with open_session(bundle, backend, threads=1) as session:
        for name in FILES[backend]:
            overwritten(folder / name, bytes((folder / name).stat().st_size))
        assert np.abs(session.run(image) - expected).max() < 1e-3


@pytest.mark.parametrize("backend", FILES)
def test_the_copy_is_private_and_gone_once_the_session_is_open(tmp_path, monkeypatch, backend):
    folder = stored_bundle(tmp_path / "bundle")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    made: list[tuple[int, list[str]]] = []
    remove = shutil.rmtree

    def removed(path: Path, **options: Any) -> None:
        made.append((os.stat(path).st_mode & 0o777, sorted(os.listdir(path))))
        remove(path, **options)

    monkeypatch.setattr(verified_files.shutil, "rmtree", removed)
    with open_session(load_bundle(folder), backend, threads=1):
        assert made == [(0o700, sorted(FILES[backend][:2]))]
        assert list(temporary.iterdir()) == []


def test_an_error_names_the_file_of_the_bundle_not_its_copy(tmp_path):
    folder = stored_bundle(tmp_path)
    model = onnx.load(folder / GRAPH, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Relu").input[0] = "nobody gives this"
    (folder / GRAPH).write_bytes(model.SerializeToString())
    rehash(folder)
    bundle = load_bundle(folder)
    with pytest.raises(ArtefactError, match=rf"refuses {folder / GRAPH}"):
        open_session(bundle, "onnxruntime", threads=1)
