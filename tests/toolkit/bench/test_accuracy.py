"""Networks of a line of NumPy are shown two small volumes, so that every score can be said beforehand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_trt.bench.accuracy import AGREEMENT, compare_all, differences, verdict
from medseg_trt.bench.accuracy_schema import Accuracy, Agreement, Verdict
from medseg_trt.bench.missing import Missing
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.imaging.images import Image
from medseg_trt.metrics.intervals import MIN_UNITS
from medseg_trt.metrics.overlap import scores
from medseg_trt.spec import Classes, Preprocessing

SIZE = (16, 16)
CLASSES = Classes(names=("background", "low", "high"))
CONTRACT = Preprocessing(image_size=SIZE)


def network(batch: np.ndarray) -> np.ndarray:
    """Tell three bands of brightness apart."""
    grey = batch[:, 0]
    return np.stack([0.3 - grey, 0.2 - np.abs(grey - 0.5), grey - 0.7], axis=1).astype(np.float32)


def shifted(batch: np.ndarray) -> np.ndarray:
    """Draw every mask a column too far to the right."""
    return network(np.roll(batch, 1, axis=3))


def volume(seed: int, slices: int = 2) -> tuple[Image, np.ndarray]:
    values = np.random.default_rng(seed).integers(0, 3, (slices, *SIZE), np.uint8)
    pixels = np.array([20, 128, 240], np.uint8)[values][..., np.newaxis]
    return Image(path=Path("volume"), pixels=pixels, spacing_mm=(3.0, 1.0, 1.0)), values


def cases(count: int = 2, labelled: bool = True):
    for number in range(count):
        image, labels = volume(number)
        yield f"case{number}", image, labels if labelled else None


def compared(run: Any, shown: Any = None, runs: Any = None) -> Any:
    return compare_all(
        runs or {"reference": network, "other": run},
        cases() if shown is None else shown,
        CONTRACT,
        CLASSES,
        lambda *_: None,
        lambda _image, labels: labels,
    )


def judged(network_scores: Any, limit: float = 0.005, allowed: float = 1.0) -> Any:
    return verdict(network_scores.networks["reference"], network_scores.networks["other"], limit, allowed, "Dice")


def test_scores_are_those_of_the_metrics_and_of_every_slice():
    network_scores = compared(shifted)
    accuracy = network_scores.accuracy("other")
    assert isinstance(accuracy, Accuracy)
    assert network_scores.accuracy("reference").mean_dice == 1
    for number, case in enumerate(accuracy.cases):
        image, labels = volume(number)
        mask = np.roll(labels, 1, axis=2)
        assert case.scores == scores(mask, labels, CLASSES, image.spacing_mm)
    assert accuracy.hd95_unit == "mm"
    assert accuracy.mean_dice == pytest.approx(sum(item.dice or 0.0 for item in accuracy.means) / 2)
    image, labels = volume(1)
    mask = np.roll(labels, 1, axis=2)
    last = accuracy.slices[-1]
    assert (last.case, last.slice) == ("case1", 1)
    assert last.counts[0] == (
        int(((mask[1] == 1) & (labels[1] == 1)).sum()),
        int((mask[1] == 1).sum()),
        int((labels[1] == 1).sum()),
    )


def test_agreement_is_of_the_networks_own_pixels():
    network_scores = compared(lambda batch: network(batch) * np.float32(1.01))
    agreement = network_scores.networks["other"].agreement()
    assert isinstance(agreement, Agreement)
    assert agreement.labels == 1
    largest = max(np.abs(network(np.stack([item[:, :, 0]] * 3)[None] / 255)).max() for item in volume(0)[0].pixels)
    assert agreement.max_abs_error == pytest.approx(0.01 * largest, rel=1e-3)
    assert agreement.sqnr_db == pytest.approx(40, abs=0.01)  # a hundredth of the signal
    assert network_scores.networks["reference"].agreement() == Agreement(max_abs_error=0.0, labels=1.0, sqnr_db=None)


def test_masks_that_are_worse_do_not_hold_and_those_that_are_equal_do():
    assert judged(compared(network)).holds
    worse = judged(compared(shifted))
    assert isinstance(worse, Verdict)
    assert not worse.holds
    assert worse.drop == pytest.approx(worse.reference - worse.candidate)
    assert worse.drop_low <= worse.drop <= worse.drop_high


def test_verdict_fails_on_changed_pixels_despite_allowed_dice_drop():
    def swapped(batch: np.ndarray) -> np.ndarray:  # both networks find nothing right, but not the same wrong things
        return -network(batch)

    def wrong(batch: np.ndarray) -> np.ndarray:
        return np.roll(network(batch), 1, axis=1)

    network_scores = compared(None, runs={"reference": swapped, "other": wrong})
    assert judged(network_scores, limit=1.0, allowed=1.0).holds
    refused = judged(network_scores, limit=1.0, allowed=0.001)
    assert not refused.holds
    assert "of the pixels have another label than the reference's, and 0.10 % may" in refused.words


def test_without_masks_the_references_are_the_truth():
    network_scores = compared(shifted, cases(labelled=False))
    accuracy = network_scores.accuracy("other")
    assert accuracy.metric == AGREEMENT
    assert accuracy.mean_dice == compared(shifted).accuracy("other").mean_dice  # the reference is always right here


def test_a_network_that_dies_is_a_failure_and_the_others_go_on():
    calls: list[int] = []

    def dies(batch: np.ndarray) -> np.ndarray:
        calls.append(len(batch))
        if len(calls) == 2:
            raise ArtefactError("it was killed by signal 11; it is not used")
        return network(batch)

    network_scores = compared(None, runs={"reference": network, "other": dies, "third": shifted})
    assert network_scores.networks["other"].failure == "it was killed by signal 11; it is not used"
    assert network_scores.accuracy("other") == Missing(reason="it was killed by signal 11; it is not used")
    assert judged(network_scores) == Missing(reason="it was killed by signal 11; it is not used")
    assert len(network_scores.accuracy("third").cases) == 2
    assert len(calls) == 2


def test_crashed_reference_aborts_the_comparison():
    def dies(batch: np.ndarray) -> np.ndarray:
        raise ArtefactError("it was killed by signal 9; it is not used")

    with pytest.raises(ArtefactError, match="signal 9"):
        compared(None, runs={"reference": dies, "other": network})


def test_logits_that_are_no_numbers_are_a_failure():
    def overflowed(batch: np.ndarray) -> np.ndarray:
        return network(batch) * np.float32(np.inf)

    network_scores = compared(overflowed)
    assert network_scores.networks["other"].failure == "case0: the logits are not finite: a value overflows its type"
    with pytest.raises(InputError, match="the reference's logits are not finite"):
        compared(None, runs={"reference": overflowed})


def test_without_a_common_unit_there_is_no_hd95():
    image, labels = volume(5)
    bare = Image(path=image.path, pixels=image.pixels)
    accuracy = compared(shifted, [*cases(), ("bare", bare, labels)]).accuracy("other")
    assert (accuracy.hd95_unit, accuracy.mean_hd95) == (None, None)
    assert all(item.hd95 is None for case in accuracy.cases for item in case.scores)


def test_the_worst_slices_are_kept_with_their_pictures():
    def spoils_one(batch: np.ndarray) -> np.ndarray:
        logits = network(batch)
        if np.array_equal(batch[-1, 0] * 255, volume(1)[0].pixels[1, :, :, 0]):
            logits[-1, :, :4] = [[[1.0]], [[0.0]], [[0.0]]]  # background in four rows
        return logits

    network_scores = compared(spoils_one, cases(3)).networks["other"]
    ((entry, slice_images),) = network_scores.worst
    assert (entry.case, entry.slice) == ("case1", 1)
    assert entry.reference_dice == 1
    assert entry.difference == pytest.approx(entry.candidate_dice - 1)
    assert (
        entry.changed_pixels
        == int((volume(1)[1][1, :4] > 0).sum())
        == int((slice_images.candidate != slice_images.reference).sum())
    )
    assert np.array_equal(slice_images.truth, volume(1)[1][1])


def test_differences_are_paired_by_case_where_there_are_enough_else_by_slice():
    for count, unit, pairs in ((2, "slices", 4), (MIN_UNITS, "cases", MIN_UNITS)):
        network_scores = compared(shifted, cases(count))
        paired = differences(
            network_scores.accuracy("reference"), network_scores.accuracy("other"), judged(network_scores)
        )
        assert [(item.metric, item.class_name) for item in paired] == [
            ("Dice", None),
            ("Dice", "low"),
            ("Dice", "high"),
            ("IoU", None),
            ("IoU", "low"),
            ("IoU", "high"),
            ("HD95", None),
            ("HD95", "low"),
            ("HD95", "high"),
        ]
        for item in paired:
            assert item.difference == pytest.approx(item.candidate - item.reference, abs=1e-12)
            assert item.low <= item.difference <= item.high
            assert (item.unit, item.pairs) == (("cases", count) if item.metric == "HD95" else (unit, pairs))
        assert paired[1].difference < 0 < paired[-1].difference  # Dice is lost, the outlines lie farther apart


def test_a_class_that_no_image_has_is_left_out_of_the_differences():
    def only_low():
        for name, image, labels in cases():
            yield name, image, (labels == 1).astype(np.uint8)

    network_scores = compared(shifted, only_low())
    paired = differences(network_scores.accuracy("reference"), network_scores.accuracy("other"), judged(network_scores))
    assert {item.class_name for item in paired} == {None, "low"}
