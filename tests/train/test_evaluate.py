"""A network is scored on the images' own pixels; every figure equals one counted by hand."""

import numpy as np
import pytest
import torch
from tiny import LESION, TWO_ORGANS, picture, write_nifti, write_pictures, write_volumes

from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.folder import Case, open_folder
from medseg_trt.train.evaluate import Evaluation, evaluate

CANVAS = Preprocessing(image_size=(32, 32))


def cases_of(root):
    data = open_folder(root)
    return [case for cases in data.splits.values() for case in cases]


def dice_by_hand(prediction, truth):
    return 2 * np.sum(prediction & truth) / (np.sum(prediction) + np.sum(truth))


def constant_network(*logits):
    """Return a network that gives every slice the same logits, whatever it sees."""
    always = np.asarray(logits, np.float32)
    return lambda batch: np.broadcast_to(always, (len(batch), *always.shape)).copy()


def perfect(num_logits, masks):
    """Return a network that knows the masks of the slices in their order."""
    queue = list(masks)

    def run(batch):
        labels = np.stack([queue.pop(0) for _ in batch])
        one_hot = labels == np.arange(num_logits)[:, np.newaxis, np.newaxis, np.newaxis]
        logits = np.moveaxis(one_hot, 0, 1) if num_logits > 1 else labels[:, np.newaxis] == 1
        return np.where(logits, 9.0, -9.0).astype(np.float32)

    return run


def test_a_perfect_network_scores_one(tmp_path):
    cases = cases_of(write_pictures(tmp_path / "pictures"))
    masks = [picture(int(case.name.removeprefix("case")))[1] for case in cases]
    evaluation = evaluate(perfect(1, masks), cases, CANVAS, LESION)
    assert evaluation.mean_dice == 1.0
    assert [mean.iou for mean in evaluation.means] == [1.0]

    volumes = cases_of(write_volumes(tmp_path / "volumes", 2, 5, (32, 32)))
    masks = [picture(100 * volume + number)[1] for volume in (0, 1) for number in range(5)]
    evaluation = evaluate(perfect(3, masks), volumes, CANVAS, TWO_ORGANS, batch=3)
    assert [(mean.name, mean.dice, mean.cases) for mean in evaluation.means] == [("disc", 1.0, 2), ("bar", 1.0, 2)]
    # The same masks in another order are no longer right, so the answers above were not compared with themselves.
    assert evaluate(perfect(3, masks[::-1]), volumes, CANVAS, TWO_ORGANS, batch=3).mean_dice < 1


def test_a_network_that_finds_nothing_scores_zero(tmp_path):
    cases = cases_of(write_pictures(tmp_path))
    evaluation = evaluate(constant_network(np.full((32, 32), -1.0)), cases, CANVAS, LESION)
    assert evaluation.mean_dice == 0.0
    (mean,) = evaluation.means
    assert (mean.dice, mean.cases, mean.missed) == (0.0, 4, 4)


def test_a_class_that_is_nowhere_is_absent_and_not_in_the_mean(tmp_path):
    root = write_volumes(tmp_path, 1, 9, (32, 32))
    labels = np.zeros((32, 32, 9), np.uint8)
    labels[:16] = 2  # in RAS the first x are the patient's left: the right half of our columns
    write_nifti(root / "masks" / "scan0.nii.gz", labels)
    case = Case(image=root / "images" / "scan0.nii.gz", mask=root / "masks" / "scan0.nii.gz")
    everything_two = constant_network(*[np.full((32, 32), value) for value in (0.0, 0.0, 1.0)])
    evaluation = evaluate(everything_two, [case], CANVAS, TWO_ORGANS)
    disc, bar = evaluation.means
    assert (disc.dice, disc.iou, disc.absent) == (None, None, 1)
    assert bar.dice == pytest.approx(2 / 3)  # half the pixels are right, all are predicted: 2 * 1/2 / (1 + 1/2)
    assert evaluation.mean_dice == bar.dice


def test_mean_dice_of_an_empty_evaluation_is_zero():
    assert Evaluation(cases=(), means=()).mean_dice == 0.0


def smooth_logits():
    coarse = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 1, 6, 6)))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").numpy()[0]


@pytest.mark.parametrize("size", [(50, 75), (21, 40)])
def test_figures_are_those_of_the_source_pixels_not_of_the_canvas(tmp_path, size):
    cases = cases_of(write_pictures(tmp_path, 4, size))
    logits = smooth_logits()
    at_source = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=size, mode="bilinear").numpy()[0]
    prediction = at_source[0] > 0
    assert np.abs(at_source).min() > 1e-5  # so that no float32 rounding, 2**-24 of a value of about 1, turns a label
    evaluation = evaluate(constant_network(*logits), cases, CANVAS, LESION)
    on_canvas = []
    for case, scored in zip(cases, evaluation.cases, strict=True):
        truth = picture(int(case.name.removeprefix("case")), size)[1] == 1
        assert scored.case == case.name
        (score,) = scored.scores
        assert score.dice == dice_by_hand(prediction, truth)  # the same integers divided: not a bit of difference
        assert (score.truth_pixels, score.predicted_pixels) == (truth.sum(), prediction.sum())
        small_truth = torch.nn.functional.interpolate(
            torch.from_numpy(truth[None, None].astype(float)), size=(32, 32), mode="nearest-exact"
        ).numpy()[0, 0]
        on_canvas.append(dice_by_hand(logits[0] > 0, small_truth > 0))
    dice = [scored.scores[0].dice or 0.0 for scored in evaluation.cases]
    assert evaluation.mean_dice == np.mean(dice)
    # The canvas is another grid: scoring there, the mistake this test is for, gives other figures for every picture.
    assert all(abs(ours - theirs) > 1e-4 for ours, theirs in zip(dice, on_canvas, strict=True))


def test_what_the_canvas_cuts_away_counts_as_missed(tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", np.zeros((40, 40, 2), np.uint8), spacing_mm=(1, 1, 1))
    write_nifti(tmp_path / "mask.nii.gz", np.ones((40, 40, 2), np.uint8), spacing_mm=(1, 1, 1))
    case = Case(image=tmp_path / "scan.nii.gz", mask=tmp_path / "mask.nii.gz")
    cropped = Preprocessing(image_size=(32, 32), spacing_mm=1.0)
    evaluation = evaluate(constant_network(np.ones((32, 32))), [case], cropped, LESION)
    (score,) = evaluation.cases[0].scores
    assert (score.truth_pixels, score.predicted_pixels) == (2 * 40 * 40, 2 * 32 * 32)
    assert score.dice == 2 * 32 * 32 / (32 * 32 + 40 * 40)


def test_a_volume_is_one_case_not_the_mean_of_its_slices(tmp_path):
    (tmp_path / "masks").mkdir()
    truth = np.zeros((32, 32, 2), np.uint8)
    truth[:, :, 0] = 1  # all of one slice and an eighth of the other
    truth[:4, :, 1] = 1
    write_nifti(tmp_path / "scan.nii.gz", np.zeros((32, 32, 2), np.uint8))
    write_nifti(tmp_path / "masks" / "scan.nii.gz", truth)
    case = Case(image=tmp_path / "scan.nii.gz", mask=tmp_path / "masks" / "scan.nii.gz")
    evaluation = evaluate(constant_network(np.ones((32, 32))), [case], CANVAS, LESION)
    dice_of_volume = 2 * (1 + 1 / 8) / (2 + 1 + 1 / 8)
    mean_of_slices = (1 + 2 / 8 / (1 + 1 / 8)) / 2
    assert evaluation.mean_dice == pytest.approx(dice_of_volume)
    assert abs(dice_of_volume - mean_of_slices) > 0.1


def test_evaluation_is_independent_of_the_batch_size(tmp_path):
    cases = cases_of(write_volumes(tmp_path, 2, 5))
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        darkness = batch.mean(axis=1, keepdims=True)
        return np.concatenate([0.3 - darkness, darkness - 0.6, 0.1 - abs(darkness - 0.45)], axis=1)

    one_by_one = evaluate(run, cases, CANVAS, TWO_ORGANS, batch=1)
    assert set(sizes) == {1}
    sizes.clear()
    assert evaluate(run, cases, CANVAS, TWO_ORGANS, batch=3) == one_by_one
    assert sizes == [3, 2, 3, 2]  # a volume of five slices; two volumes never share a batch
    assert 0 < one_by_one.mean_dice < 1
