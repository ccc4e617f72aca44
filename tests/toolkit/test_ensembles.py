"""Ensembles: the mean of logits, of networks that fit together."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from tiny import TWO_ORGANS, picture

import medseg_trt
from medseg_trt.errors import UsageError
from medseg_trt.evaluate import Network, ensemble_of
from medseg_trt.sessions.ensemble import EnsembleSession, mean_logits, require_alike
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.provenance import Provenance

PREPROCESSING = Preprocessing(image_size=(32, 32))


def test_the_mean_of_logits_is_not_the_mean_of_masks():
    runs = [
        lambda batch, values=values: np.full((1, 2, 1, 1), 0, np.float32) + values
        for values in (
            np.array([9.0, 0.0], np.float32).reshape(1, 2, 1, 1),
            np.array([0.0, 1.0], np.float32).reshape(1, 2, 1, 1),
            np.array([0.0, 1.0], np.float32).reshape(1, 2, 1, 1),
        )
    ]
    mean = mean_logits(runs)(np.zeros((1, 3, 1, 1), np.float32))
    np.testing.assert_allclose(mean.ravel(), [3.0, 2 / 3], rtol=1e-6)
    assert mean.argmax(1).item() == 0, "two of three networks alone say 1"
    assert mean.dtype == np.float32


def test_an_ensemble_of_one_network_twice_draws_its_masks(tiny_bundle, tmp_path):
    pixels, _ = picture(3)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    alone, twice = (
        next(medseg_trt.infer([tmp_path / "image.png"], tiny_bundle, backend="onnxruntime", ensemble=others))
        for others in ((), (tiny_bundle,))
    )
    np.testing.assert_array_equal(alone.labels, twice.labels)


def test_networks_that_do_not_fit_are_refused():
    first = ("a", PREPROCESSING, TWO_ORGANS)
    with pytest.raises(UsageError, match=r"a and b prepare images in different ways"):
        require_alike(first, ("b", replace(PREPROCESSING, window=(0.0, 1.0)), TWO_ORGANS))
    with pytest.raises(UsageError, match=r"a and b know different classes"):
        require_alike(first, ("b", PREPROCESSING, Classes(names=("background", "x", "y"))))
    network = Network(
        name="a",
        run=lambda batch: batch,
        preprocessing=PREPROCESSING,
        classes=TWO_ORGANS,
        provenance=Provenance(),
    )
    with pytest.raises(UsageError, match="needs two networks"):
        ensemble_of([network])


def test_the_sessions_are_closed_and_named(tiny_bundle):
    sessions = [open_session(medseg_trt.load_bundle(tiny_bundle), "onnxruntime") for _ in range(2)]
    closed: list[int] = []
    for number, session in enumerate(sessions):
        session.close = lambda number=number: closed.append(number)  # type: ignore[method-assign]  # recorded
    with EnsembleSession(sessions, "the mean of 2 networks") as session:
        assert session.description == "the mean of 2 networks"
        assert not session.gives_masks
        assert session.device_pipeline(np.zeros((1, 8, 8, 1), np.uint8), None) is None
    assert sorted(closed) == [0, 1]
