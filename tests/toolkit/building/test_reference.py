import numpy as np
import pytest

from medseg_trt.building.contract import Contract
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import JudgedImages, ReferenceImages
from medseg_trt.errors import AccuracyGateError
from medseg_trt.imaging.preprocess import Size, restore
from medseg_trt.network_spec import ModelSpec
from medseg_trt.sessions.base import Session
from medseg_trt.spec import BuildSpec, Classes, Preprocessing

SIZE = (16, 16)
IMAGES = np.random.default_rng(0).normal(size=(6, 3, *SIZE)).astype(np.float32)


def network(batch: np.ndarray) -> np.ndarray:
    """Return three logits that are none of the image's values, so that no answer is right by chance."""
    return np.stack([batch[:, 0] + batch[:, 1], batch[:, 1] - batch[:, 2], 0.5 * batch[:, 2]], axis=1)


def reference_of(reference=network, max_dice_drop: float = 0.005, max_abs_error: float = 1e-4) -> Reference:
    judged = JudgedImages(
        inputs=IMAGES, sizes=((20, 12),) * 6, spacings=(None,) * 6, cases=tuple("abcdef"), truths=None
    )
    contract = Contract(
        model=ModelSpec(image_size=SIZE, num_classes=3),
        preprocessing=Preprocessing(image_size=SIZE),
        classes=Classes(names=("background", "disc", "bar")),
    )
    images = ReferenceImages(verified=IMAGES[:4], description="generated noise", judged=judged, calibration=None)
    spec = BuildSpec(max_dice_drop=max_dice_drop, max_abs_error=max_abs_error)
    return Reference(network=reference, contract=contract, images=images, spec=spec)


def test_the_reference_is_asked_once_for_every_judged_image():
    calls = []

    def counted(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        return network(batch)

    reference = reference_of(counted)
    for _ in range(3):
        reference.verdict(network)
    assert calls == [1] * 6
    for _ in range(3):
        reference.check_logits(network)
    assert calls == [1] * (6 + 4)  # and once for every verified one


def test_the_same_network_is_exact_and_loses_nothing():
    reference = reference_of()
    assert reference.check_logits(network)["max_abs_error"] == 0
    verdict, figures = reference.verdict(network)
    assert verdict.holds
    assert (verdict.drop, figures["max_abs_error"], figures["agreement"]) == (0, 0, 1)
    assert figures["sqnr_db"] is None  # there is no noise to compare with
    assert figures["gate"].holds
    assert verdict.metric == "agreement with PyTorch in Dice"


def test_an_error_that_flips_no_pixel_is_found_in_the_logits():
    with pytest.raises(AccuracyGateError, match=r"logits differ by 0\.001"):
        reference_of().check_logits(lambda batch: network(batch) + np.float32(1e-3))
    assert (
        reference_of(max_abs_error=2e-3).check_logits(lambda batch: network(batch) + np.float32(1e-3))["agreement"] == 1
    )


def test_verdict_fails_for_wrong_masks_and_reports_the_agreement():
    def turned(batch: np.ndarray) -> np.ndarray:
        return network(batch)[:, ::-1].copy()

    verdict, figures = reference_of().verdict(turned)
    assert not verdict.holds
    assert verdict.limit == 0.005
    assert figures["agreement"] < 0.7
    assert figures["gate"].high == verdict.high
    assert figures["num_images"] == 6


def test_a_larger_drop_may_be_allowed():
    def shaken(batch: np.ndarray) -> np.ndarray:
        return network(batch) + np.random.default_rng(1).normal(0, 0.05, (1, 3, *SIZE)).astype(np.float32)

    verdict, _ = reference_of().verdict(shaken)
    assert 0.005 < verdict.high < 0.2
    assert not verdict.holds
    assert reference_of(max_dice_drop=0.2).verdict(shaken)[0].holds


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_make_no_masks(value):
    logits = network(IMAGES)
    logits[3, 1, 2, 2] = value
    with pytest.raises(AccuracyGateError, match="not finite"):
        reference_of().verdict_of(logits)


def test_the_noise_is_relative_to_the_signal():
    reference = reference_of()
    logits = network(IMAGES).astype(np.float64)
    noise = np.random.default_rng(2).normal(0, 0.01, logits.shape)
    expected = np.square(noise).sum() / np.square(logits).sum()
    noisy_logits = (logits + noise).astype(np.float32)
    assert reference.error_of(noisy_logits) == pytest.approx(
        expected, rel=1e-4
    )  # the sum is rounded to float32: 1e-7 of 1 / 0.01
    assert reference.verdict_of(noisy_logits)[1]["sqnr_db"] == pytest.approx(-10 * np.log10(expected), rel=1e-4)


def test_masks_are_compared_at_the_images_own_size(monkeypatch):
    seen = []

    def watched(judged, logits, preprocessing, original=JudgedImages.masks):
        masks = original(judged, logits, preprocessing)
        seen.extend(mask.shape for mask in masks)
        return masks

    monkeypatch.setattr(JudgedImages, "masks", watched)
    reference_of().verdict(network)
    assert seen == [(20, 12)] * 12


class Masking(Session):
    """A network that makes its masks itself; ``fault`` spoils so many rows of each."""

    backend, device, description, gives_masks = "here", "CPU", "a masking network", True

    def __init__(self, fault: int = 0) -> None:
        self.fault = fault

    def run(self, batch: np.ndarray) -> np.ndarray:
        return network(batch)

    def masks(self, batch: np.ndarray, size: Size, resampled: Size) -> np.ndarray:
        assert resampled == SIZE
        masks = np.stack(
            [restore(slice_logits, size, Preprocessing(image_size=SIZE), None) for slice_logits in network(batch)]
        )
        masks[:, : self.fault] = (masks[:, : self.fault] + 1) % 3
        return masks

    def close(self) -> None: ...


def test_masks_that_the_graph_makes_itself_are_compared_with_pytorchs():
    reference = reference_of()
    assert reference.check_masks_of_graph(reference.in_graph_masks(Masking())) == {"own_masks_agreement": 1}
    with pytest.raises(AccuracyGateError, match=r"agree with PyTorch's on 95\.00 % of the pixels only"):
        reference.check_masks_of_graph(reference.in_graph_masks(Masking(fault=1)))  # one row of twenty


def test_the_gate_judges_the_graphs_own_masks_where_it_makes_some():
    reference = reference_of()
    assert reference.verdict(network, reference.in_graph_masks(Masking()))[0].holds
    assert not reference.verdict(network, reference.in_graph_masks(Masking(fault=1)))[0].holds
