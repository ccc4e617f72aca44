"""Post-processing is chosen by the checkpoint's masks and kept where every execution keeps the corrected masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import SIZE, TWO_ORGANS, write_description, write_volumes

from medseg_trt.building import postprocessing
from medseg_trt.building.contract import Contract
from medseg_trt.building.executions import ExecutionTrials
from medseg_trt.building.guard import guard_of
from medseg_trt.building.postprocessing import judged_postprocessing, learn
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import JudgedImages, ReferenceImages
from medseg_trt.bundles.manifest import Execution, Variant
from medseg_trt.bundles.verification import Verification
from medseg_trt.guard.guard import unusual
from medseg_trt.imaging.images import read_image
from medseg_trt.network_spec import ModelSpec
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import BuildSpec, Preprocessing
from medseg_trt.train.datasets.folder import open_folder

CONTRACT = Contract(
    model=ModelSpec(image_size=SIZE, num_classes=3),
    preprocessing=Preprocessing(image_size=SIZE),
    classes=TWO_ORGANS,
)
GREYS = np.array([40, 200, 110], np.float32) / 255  # of the background, the disc and the bar


def network(batch: np.ndarray) -> np.ndarray:
    """Label the pixels by their grey, and see another disc in a corner."""
    logits = -np.abs(batch[:, :1] - GREYS.reshape(1, 3, 1, 1))
    logits[:, 1, -3:, -3:] = 1
    return logits.astype(np.float32)


def other_corner(batch: np.ndarray) -> np.ndarray:
    """Miss the disc, so that the false one is the largest."""
    logits = network(batch)
    logits[:, 1, :-3, :] = -9
    return logits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = write_volumes(tmp_path_factory.mktemp("data"), count=7)
    names = [{"image": f"scan{index}"} for index in range(7)]
    write_description(root, splits={"train": names[:2], "val": names[2:]})
    return root


@pytest.fixture(scope="module")
def reference(data) -> Reference:
    noise = np.random.default_rng(0).normal(size=(2, 3, *SIZE)).astype(np.float32)
    judged = JudgedImages(inputs=noise, sizes=(SIZE,) * 2, spacings=(None,) * 2, cases=("a", "b"), truths=None)
    images = ReferenceImages(
        verified=noise, description="generated", judged=judged, calibration=None, labelled=open_folder(data)
    )
    return Reference(network=network, contract=CONTRACT, images=images, spec=BuildSpec())


class Stub(ChildSession):
    """A network in NumPy behind the interface of a child."""

    def __init__(self, run) -> None:
        self._run = run
        self.description = self.backend = self.device = "a stand-in"
        self.gives_masks = False

    def run(self, batch: np.ndarray) -> np.ndarray:
        return self._run(batch)

    def close(self) -> None:
        pass


def judged(learnt, run, reference, monkeypatch, tmp_path):
    monkeypatch.setattr(postprocessing, "execution_child", lambda *_: Stub(run))
    figures = Verification(by="a stand-in", images="generated", num_images=1, max_abs_error=0.0, agreement=1.0)
    execution = Execution(
        variant="fp32",
        backend="onnxruntime",
        compute_dtype="fp32",
        executed=True,
        golden_error=0.0,
        verification=figures,
    )
    variant = Variant(precision="fp32", dialect="canonical", graph="fp32.onnx", weights="w.bin", passes={})
    tried = ExecutionTrials(executions=(execution,), rejected=())
    return judged_postprocessing(learnt, reference, tmp_path, {"fp32": variant}, tried)


def test_a_false_component_is_removed_and_the_executions_are_judged_after_it(reference, monkeypatch, tmp_path, caplog):
    learnt = learn(reference)
    assert learnt is not None
    steps = learnt.post.classes[0]
    assert steps.name == "disc"
    assert steps.largest or steps.min_size > 0
    assert (learnt.post.cases, learnt.post.slices, steps.gain.units) == (5, 25, "cases")
    assert "generated, split val" in learnt.post.description
    assert judged(learnt, network, reference, monkeypatch, tmp_path) == learnt.post
    assert judged(learnt, other_corner, reference, monkeypatch, tmp_path) is None
    assert "the bundle gets no post-processing: a stand-in does not keep its masks" in caplog.text
    assert judged(None, network, reference, monkeypatch, tmp_path) is None


def test_cases_beyond_the_limit_are_left_out_and_said(reference, monkeypatch):
    monkeypatch.setattr(postprocessing, "MAX_RUNS", 12)
    learnt = learn(reference)
    assert learnt is not None
    assert learnt.post.slices == 10
    assert "without 3 cases" in learnt.post.description


def test_without_labelled_images_nothing_is_learnt(reference):
    without = replace(reference, images=replace(reference.images, labelled=None))
    assert learn(without) is None
    assert guard_of(without) is None


def test_the_guard_knows_the_training_split(reference, data):
    guard = guard_of(reference)
    assert guard is not None
    assert (guard.training_slices, guard.held_out_slices, guard.held_out_cases) == (10, 25, 5)
    image = read_image(data / "images" / "scan6.nii.gz")
    assert unusual(guard, image, CONTRACT.preprocessing) is None
    inverted = replace(image, pixels=255 - image.pixels)
    assert "intensities" in (unusual(guard, inverted, CONTRACT.preprocessing) or "")
