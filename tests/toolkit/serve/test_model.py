"""A served model gives the masks of ``infer`` also where the network's last bits depend on the batch."""

import threading

import numpy as np
import pytest

from medseg_trt.imaging.images import read_image
from medseg_trt.pipeline import infer
from medseg_trt.serve import model as model_module
from medseg_trt.serve.model import INFER_BATCH, open_models
from medseg_trt.serve.settings import Limits, ServeSettings


@pytest.mark.parametrize("invariant", [True, False])
def test_batches_equal_those_of_infer_if_logits_depend_on_the_batch(bundle, inputs, invariant, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "is_batch_invariant", lambda *_: invariant)
    settings = ServeSettings(
        bundles=(bundle,), spool=tmp_path, backend="onnxruntime", threads=1, limits=Limits(max_batch=8)
    )
    (served,) = open_models(settings)
    sizes, waiting = [], threading.Event()

    def run(values, original=served.session.run):
        waiting.wait(0.2)  # so that further slices wait, and could be joined
        sizes.append(len(values))
        return original(values)

    monkeypatch.setattr(served.session, "run", run)
    path = inputs / "volume.nii.gz"
    with served.queue.open() as request:
        mask = served.segment(read_image(path), request)
    served.close()
    (expected,) = infer([path], bundle, backend="onnxruntime", threads=1)
    np.testing.assert_array_equal(mask.labels, expected.labels)
    if invariant:
        assert max(sizes) > INFER_BATCH
    else:
        assert sizes == [4, 4, 3]


@pytest.mark.parametrize(("threads", "streams", "compared"), [(2, 4, INFER_BATCH), (2, 1, 9), (1, 4, 9)])
def test_batch_invariance_is_checked_up_to_the_largest_possible_batch(
    bundle, threads, streams, compared, tmp_path, monkeypatch
):
    """Where runs overlap none holds slices of several requests, so larger batches do not count."""
    asked = []
    monkeypatch.setattr(model_module, "is_batch_invariant", lambda *arguments: bool(asked.append(arguments[2])))
    settings = ServeSettings(
        bundles=(bundle,),
        spool=tmp_path,
        backend="onnxruntime",
        threads=threads,
        streams=streams,
        limits=Limits(max_batch=9),
    )
    (served,) = open_models(settings)
    served.close()
    assert asked == [compared]
