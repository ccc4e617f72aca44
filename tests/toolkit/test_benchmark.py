import numpy as np
import pytest
from tiny import write_volumes

from medseg_trt import benchmark
from medseg_trt.benchmark import bench
from medseg_trt.errors import AccuracyGateError
from medseg_trt.sessions.onnxruntime import OnnxRuntimeSession

QUICK = {"batch": 2, "warmup_ms": 0.0, "duration_s": 0.05}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_volumes(tmp_path_factory.mktemp("data"))


def test_both_networks_are_compared_and_timed_on_the_same_slices(tiny_bundle, data):
    checkpoint = tiny_bundle.parent / "model" / "model.pt"
    report = bench(tiny_bundle, checkpoint, data, "val", **QUICK)
    reference, candidate = report.rows
    assert report.images == "5 slices of generated, split val"
    assert (reference.backend, candidate.backend) == ("pytorch", "onnxruntime")
    assert (reference.max_abs_error, reference.agreement) == (0, 1)
    assert 0 < candidate.max_abs_error < 1e-4
    assert candidate.agreement >= 0.9999
    assert candidate.mean_dice == pytest.approx(reference.mean_dice, abs=1e-3)
    assert reference.timing.runs == candidate.timing.runs >= 10
    on_disk = sum((tiny_bundle / name).stat().st_size for name in ("fp32.onnx", "weights-fp32.bin"))
    assert candidate.size_mb == pytest.approx(on_disk / 1e6)
    block = next(checkpoint.parent.glob("block-*.safetensors"))
    assert reference.size_mb == pytest.approx((checkpoint.stat().st_size + block.stat().st_size) / 1e6)


def test_a_network_that_gives_other_masks_is_not_timed(tiny_bundle, data, monkeypatch):
    original = OnnxRuntimeSession.run
    calls = []

    def turned(session, batch):
        calls.append(len(batch))
        logits = original(session, batch)
        return logits if len(calls) == 1 else np.ascontiguousarray(logits[:, ::-1])  # the golden input passes

    monkeypatch.setattr(OnnxRuntimeSession, "run", turned)
    monkeypatch.setattr(benchmark, "time_interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(AccuracyGateError, match="is not timed"):
        bench(tiny_bundle, tiny_bundle.parent / "model" / "model.pt", data, "val", **QUICK)
