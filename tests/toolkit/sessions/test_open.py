import builtins
import shutil
from dataclasses import replace

import numpy as np
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.manifest import FileEntry
from medseg_trt.errors import ArtefactError, MissingExtraError, UsageError
from medseg_trt.files import sha256
from medseg_trt.sessions import onnxruntime as onnxruntime_module
from medseg_trt.sessions import open as session_module
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import choose, open_session
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.train.checkpoint import load_checkpoint

CPU_BACKENDS = [name for name, backend in BACKENDS.items() if not backend.gpu]


@pytest.fixture
def bundle(tiny_bundle):
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_backend_answers_as_the_reference(bundle, tiny_bundle, backend, batch):
    images = np.random.default_rng(0).random((batch, 3, 32, 32), dtype=np.float32)
    checkpoint = load_checkpoint(tiny_bundle.parent / "model" / "model.pt")
    with open_session(bundle, backend) as session, open_reference(checkpoint) as reference:
        # The bundle was verified to 1e-4 on other images; a wrong part of the network is off by 1e-1 (see tiny.py).
        np.testing.assert_allclose(session.run(images), reference.run(images), atol=1e-4, rtol=0)
        assert session.backend == backend
        assert reference.backend == "pytorch"


def test_auto_takes_the_fastest_and_says_so(bundle, caplog):
    with caplog.at_level("INFO", "medseg_trt"), open_session(bundle) as session:
        assert session.backend == bundle.default.backend
    times = [execution.median_ms for execution in bundle.content.executions]
    assert times == sorted(times)
    assert f"auto: the fastest of {len(times)} at the build" in caplog.text
    assert session.description in caplog.text


def test_auto_takes_the_next_where_the_fastest_is_not_installed_and_says_so(bundle, caplog, monkeypatch):
    first, second = bundle.default.backend, next(name for name in CPU_BACKENDS if name != bundle.default.backend)
    monkeypatch.setattr(session_module, "is_installed", lambda backend: backend != first)
    with caplog.at_level("INFO", "medseg_trt"), open_session(bundle) as session:
        assert session.backend == second
    assert "the fastest at the build, is not installed here" in caplog.text


def test_a_precision_that_the_bundle_lacks_lists_what_it_holds(bundle):
    with pytest.raises(UsageError, match=r"holds nothing for openvino int8; it holds .*onnxruntime fp32"):
        choose(bundle, "openvino", "int8")


def test_an_unknown_backend_lists_the_known_ones(bundle):
    with pytest.raises(UsageError, match="auto, onnxruntime"):
        open_session(bundle, "coreml")


def test_a_backend_that_is_not_installed_names_its_extra(bundle, monkeypatch):
    original = builtins.__import__
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medseg-trt\[cpu\]'"):
        open_session(bundle, "onnxruntime")
    assert builtins.__import__ is original


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_threads_are_passed_on_and_do_not_change_the_masks(bundle, backend):
    images = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    with open_session(bundle, backend, threads=1) as one, open_session(bundle, backend, threads=2) as two:
        assert "1 thread" in one.description
        assert "2 threads" in two.description
        np.testing.assert_array_equal(one.run(images).argmax(1), two.run(images).argmax(1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_batch_of_another_size_is_refused(bundle, backend):
    with open_session(bundle, backend) as session, pytest.raises(ValueError, match="network takes"):
        session.run(np.zeros((1, 3, 48, 32), np.float32))


def test_a_session_that_answers_the_golden_input_otherwise_is_refused_and_closed(bundle, monkeypatch):
    closed = []
    original = onnxruntime_module.open_graph

    def broken(path, precision, threads, compute) -> Session:
        session = original(path, precision, threads, compute)
        run = session.run
        session.run = lambda batch: run(batch) + np.float32(5e-3)
        session.close = lambda: closed.append(True)
        return session

    monkeypatch.setattr(onnxruntime_module, "open_graph", broken)
    with pytest.raises(ArtefactError, match="golden input"):
        open_session(bundle, "onnxruntime")
    assert closed == [True]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_graph_that_a_backend_refuses_is_one_clear_line(bundle, tmp_path, backend):
    folder = shutil.copytree(bundle.folder, tmp_path / "broken.medseg")
    files = dict(bundle.content.files)
    for graph in ("fp32.onnx", "fp32-plain.onnx"):
        (folder / graph).write_bytes(b"no onnx")
        files[graph] = FileEntry(sha256=sha256(folder / graph), bytes=len(b"no onnx"))
    with pytest.raises(ArtefactError, match="refuses") as caught:
        open_session(replace(bundle, folder=folder, content=replace(bundle.content, files=files)), backend)
    assert "\n" not in str(caught.value)


def test_backends_are_loaded_by_name(bundle):
    assert all(hasattr(session_module.import_module(entry.module), entry.function) for entry in BACKENDS.values())
