"""How many images a bundle computes beside each other: only as many as were faster, with the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg_trt.building import stream_trials
from medseg_trt.building.executions import ExecutionTrials
from medseg_trt.building.stream_trials import with_streams
from medseg_trt.bundles.manifest import MAX_STREAMS, Execution, Variant
from medseg_trt.bundles.verification import Verification
from medseg_trt.errors import ArtefactError

IMAGE = np.zeros((1, 3, 4, 4), np.float32)
VARIANTS = {"int8": Variant(precision="int8", dialect="plain", graph="g.onnx", weights="w.bin", passes={})}


def execution(backend: str = "openvino", *, executed: bool = True) -> Execution:
    return Execution(
        variant="int8",
        backend=backend,
        compute_dtype="fp32",
        executed=executed,
        golden_error=1.0,
        verification=Verification(by="fake", images="generated", num_images=1, max_abs_error=0.0, agreement=1.0),
        median_ms=1.0,
    )


class FakeChild:
    """Takes so many milliseconds an image, and returns its offset as logits."""

    def __init__(self, median_ms: float, offset: float) -> None:
        self.median_ms, self.offset = median_ms, offset

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def run(self, batch):
        return np.full(batch.shape, self.offset)

    def time(self, _batch, _seconds, min_runs):
        return [self.median_ms] * min_runs


@pytest.fixture
def chosen(monkeypatch):
    def choose(best, *, cores=2, alone=(10.0, 0.0), beside=(9.0, 0.0)):
        opened = []

        def child(_folder, _variant, _execution, streams=1):
            opened.append(streams)
            form = alone if streams == 1 else beside
            if isinstance(form, Exception):
                raise form
            return FakeChild(*form)

        monkeypatch.setattr(stream_trials, "execution_child", child)
        monkeypatch.setattr(stream_trials, "cores", lambda: cores)
        tried = ExecutionTrials(executions=(best, execution("onnxruntime")), rejected=("x",))
        result = with_streams(Path(), VARIANTS, tried, IMAGE)
        assert result.executions[1] == tried.executions[1]
        assert result.rejected == tried.rejected
        return result.executions[0].streams, opened

    return choose


def test_images_run_beside_each_other_where_that_is_faster(chosen):
    assert chosen(execution()) == (2, [1, 2, 1, 2])
    assert chosen(execution(), cores=64)[0] == MAX_STREAMS


@pytest.mark.parametrize(
    "beside", [(9.6, 0.0), (9.0, 1e-6), ArtefactError("it died")], ids=["hardly faster", "other bits", "died"]
)
def test_images_run_alone_where_that_is_as_fast_or_streams_differ_or_die(chosen, beside):
    assert chosen(execution(), beside=beside)[0] == 1


@pytest.mark.parametrize(
    ("best", "cores"), [(execution("onnxruntime"), 2), (execution(executed=False), 2), (execution(), 1)]
)
def test_nothing_is_tried_without_streams_or_cores_or_the_back_end(chosen, best, cores):
    assert chosen(best, cores=cores) == (1, [])


@pytest.mark.parametrize("streams", [0, -1, MAX_STREAMS + 1])
def test_a_manifest_with_no_streams_or_too_many_is_refused(streams):
    with pytest.raises(ValueError, match=f"must be from 1 to {MAX_STREAMS}"):
        replace(execution(), streams=streams)
