"""A network of the CPU benchmark runs in a child process and reports its times and memory."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import MedsegError
from medseg_trt.sessions.open import open_session


@pytest.fixture
def child(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "bench_cpu_child", raising=False)
    return import_module("bench_cpu_child")


def test_a_child_gives_the_logits_times_and_memory_of_a_bundle(child, tiny_bundle):
    images = np.random.default_rng(0).random((2, 3, *load_bundle(tiny_bundle).preprocessing.image_size), np.float32)
    opened = child.Child(child.Variant(name="tiny", group="ours", opener="infer", path=tiny_bundle))
    try:
        assert opened.opened_s > 0
        logits = opened.run(images)
        assert len(opened.time(images[:1], 0.0, 3)) >= 3
        assert opened.memory()["peak_resident_mb"] > 10
    finally:
        opened.close()
    with open_session(load_bundle(tiny_bundle)) as session:
        expected = np.concatenate([session.run(image[np.newaxis]) for image in images])
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # another run of the same network: fp32 sums reordered


def test_child_raises_an_error_for_a_missing_bundle_or_onnx_file(child, tmp_path):
    variant = child.Variant(name="no bundle", group="ours", opener="infer", path=tmp_path)
    with pytest.raises(MedsegError, match=str(tmp_path)):
        child.Child(variant)
    broken = child.Variant(name="broken", group="peer", opener="onnxruntime", path=tmp_path / "none.onnx")
    with pytest.raises(MedsegError):
        child.Child(broken)
