"""The ways to count, each against the published code restated here, and every empty case in every one of them."""

import numpy as np
import PIL.Image
import pytest
from tiny import LESION, TWO_ORGANS, make_checkpoint, picture, write_nifti, write_pictures, write_volumes

from medseg_trt.errors import UsageError
from medseg_trt.evaluate import evaluate_all
from medseg_trt.metrics.overlap import mean_scores, scores
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.evaluate import evaluate

medpy = pytest.importorskip("medpy.metric.binary", reason="medpy is the oracle of TransUNet's metric")
CANVAS = Preprocessing(image_size=(32, 32))
BRANCHES = {"present": (True, True), "missed": (True, False), "false alarm": (False, True), "absent": (False, False)}


def iou_score(prediction, truth):
    """Restate UNeXt's ``metrics.iou_score`` for a batch of masks."""
    intersection, union = (prediction & truth).sum(), (prediction | truth).sum()
    iou = (intersection + 1e-5) / (union + 1e-5)
    return iou, 2 * iou / (iou + 1)


def calculate_metric_percase(prediction, truth):
    """Restate TransUNet's ``utils.calculate_metric_percase``."""
    if prediction.sum() > 0 and truth.sum() > 0:
        return medpy.dc(prediction, truth), medpy.hd95(prediction, truth)
    if prediction.sum() > 0 and truth.sum() == 0:
        return 1, 0
    return 0, 0


def noisy(truth, seed):
    """Return a wrong version of some masks: shifted, with an island."""
    moved = np.roll(truth, (seed % 3 - 1, 2), axis=(-2, -1)).copy()
    moved[..., -3:, -3:] = 1
    return moved


def one_class(mask, seed):
    rng = np.random.default_rng(seed)
    blob = np.zeros((6, 20, 24), np.uint8)
    top, left = rng.integers(2, 9, 2)
    blob[1:4, top : top + 7, left : left + 8] = mask
    return blob


def pair(branch, seed=0):
    in_truth, in_prediction = BRANCHES[branch]
    truth = one_class(int(in_truth), seed)
    return (noisy(truth, seed) if in_truth else one_class(1, seed)) * np.uint8(in_prediction), truth


def network_of(predictions):
    """Return a network that answers with these masks, in their order, whatever it sees."""
    queue = list(predictions)
    return lambda batch: np.stack([np.where(queue.pop(0)[np.newaxis] == 1, 9, -9) for _ in batch]).astype(np.float32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven generated pictures of the network's size in four branches, their masks, and what is predicted for them."""
    root = write_pictures(tmp_path_factory.mktemp("pictures"), 11)
    cases, truths, predictions = [], [], []
    for index in range(11):
        branch = list(BRANCHES)[[0, 0, 1, 0, 2, 0, 3, 0, 0, 0, 0][index]]
        truth = (picture(index)[1] == 1).astype(np.uint8)
        prediction = noisy(truth, index) if BRANCHES[branch][1] else np.zeros_like(truth)
        truth *= np.uint8(BRANCHES[branch][0])
        PIL.Image.fromarray(truth * np.uint8(255)).save(root / "masks" / f"case{index}.png")
        cases.append(Case(image=root / "images" / f"case{index}.png", mask=root / "masks" / f"case{index}.png"))
        truths.append(truth)
        predictions.append(prediction)
    return cases, truths, predictions


@pytest.mark.parametrize("batch", [8, 4, 3])
def test_unext_batch_is_what_unexts_validation_prints(pictures, batch):
    cases, truths, predictions = pictures
    total, weight = np.zeros(2), 0
    for start in range(0, 11, batch):
        part = slice(start, start + batch)
        figures = iou_score(np.stack(predictions[part]) == 1, np.stack(truths[part]) == 1)
        total += np.array(figures) * len(truths[part])  # AverageMeter.update(iou, input.size(0))
        weight += len(truths[part])
    (mean,) = evaluate(network_of(predictions), cases, CANVAS, LESION, batch, metric="unext_batch").means
    assert (mean.iou, mean.dice) == pytest.approx(tuple(total / weight), abs=1e-12)
    assert mean.hd95 is None


def test_unext_batch_depends_on_the_batch_and_the_order_and_per_image_does_not(pictures):
    cases, _, predictions = pictures

    def dice(metric, batch, order):
        run = network_of([predictions[index] for index in order])
        return evaluate(run, [cases[index] for index in order], CANVAS, LESION, batch, metric=metric).mean_dice

    natural, turned = list(range(11)), [3, 9, 0, 6, 1, 10, 4, 2, 8, 5, 7]
    assert abs(dice("unext_batch", 8, natural) - dice("unext_batch", 4, natural)) > 1e-4  # rounding is 1e-15
    assert abs(dice("unext_batch", 8, natural) - dice("unext_batch", 8, turned)) > 1e-4
    single = dice("per_image", 8, natural)
    for batch, order in ((4, natural), (1, natural), (8, turned)):
        assert dice("per_image", batch, order) == pytest.approx(single, abs=1e-12)
    assert dice("unext_batch", 1, turned) == pytest.approx(single, abs=1e-12)


def test_per_image_is_the_mean_of_every_image_and_its_branches_are_counted(pictures):
    cases, truths, predictions = pictures
    (mean,) = evaluate(network_of(predictions), cases, CANVAS, LESION, metric="per_image").means
    expected = np.mean([iou_score(item == 1, truth == 1) for item, truth in zip(predictions, truths, strict=True)], 0)
    assert (mean.iou, mean.dice) == pytest.approx(tuple(expected), abs=1e-12)
    assert (mean.present, mean.missed, mean.false_alarms, mean.absent) == (8, 1, 1, 1)


def test_images_are_scored_at_the_networks_size(tmp_path):
    root = write_pictures(tmp_path, 1, (64, 96))
    case = Case(image=root / "images" / "case0.png", mask=root / "masks" / "case0.png")
    everything = lambda batch: np.ones((len(batch), 1, 32, 32), np.float32)  # noqa: E731
    for metric in ("per_image", "unext_batch"):
        ((score,),) = (item.scores for item in evaluate(everything, [case], CANVAS, LESION, metric=metric).cases)
        assert score.predicted_pixels == 32 * 32
    ((score,),) = (item.scores for item in evaluate(everything, [case], CANVAS, LESION).cases)
    assert score.predicted_pixels == 64 * 96


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("seed", range(3))
def test_volume_transunet_is_transunets_in_every_branch(branch, seed):
    prediction, truth = pair(branch, seed)
    rule = METRICS["volume_transunet"].rule
    (score,) = map(rule, scores(prediction, truth, LESION, (1.0, 1.0, 1.0)))
    assert score.state == branch
    assert (score.dice, score.hd95) == pytest.approx(calculate_metric_percase(prediction, truth), abs=1e-9)


def test_every_metric_scores_missed_false_alarm_and_absent_classes_as_defined():
    """Dice, IoU and HD95 of one unit; HD95 of "present" is checked against MedPy elsewhere."""
    expected = {
        "volume": {"missed": (0, 0, None), "false alarm": (0, 0, None), "absent": (None, None, None)},
        "volume_transunet": {"missed": (0, None, 0), "false alarm": (1, None, 0), "absent": (0, None, 0)},
    }
    counted = {"volume": {"missed"}, "volume_transunet": {"missed", "false alarm", "absent"}}
    for metric, branches in expected.items():
        for branch, figures in branches.items():
            prediction, truth = pair(branch)
            score = tuple(map(METRICS[metric].rule, scores(prediction, truth, LESION, (1.0, 1.0, 1.0))))
            assert (score[0].dice, score[0].iou, score[0].hd95) == figures, (metric, branch)
            (mean,) = mean_scores([score], over_all=METRICS[metric].every_unit_counts)
            assert mean.dice == (figures[0] if branch in counted[metric] else None)
    for metric in ("per_image", "unext_batch"):
        for branch in BRANCHES:
            prediction, truth = pair(branch)
            (score,) = map(METRICS[metric].rule, scores(prediction, truth, LESION))
            iou, dice = iou_score(prediction == 1, truth == 1)
            assert (score.iou, score.dice) == pytest.approx((iou, dice), abs=1e-15)
            assert METRICS[metric].every_unit_counts
        assert iou_score(*(item == 1 for item in pair("absent")))[0] == 1
        assert iou_score(*(item == 1 for item in pair("missed")))[0] < 1e-6


def test_cases_are_averaged_class_by_class_and_distances_are_in_voxels_whatever_the_spacing(tmp_path):
    cases, expected, outputs = [], [], []
    for index, branch in enumerate(BRANCHES):
        (prediction, truth), disc = pair(branch, index), one_class(1, 7 + index)
        labels = np.where(truth == 1, 2, disc).astype(np.uint8)
        image = write_nifti(tmp_path / f"i{index}.nii.gz", np.zeros((24, 20, 6), np.int16), (0.7, 0.7, 5.0))
        mask = write_nifti(tmp_path / f"m{index}.nii.gz", labels[:, ::-1, ::-1].transpose(2, 1, 0), (0.7, 0.7, 5.0))
        predicted = np.where(prediction == 1, 2, disc)
        cases.append(Case(image=image, mask=mask))
        outputs += list(predicted)
        expected.append([calculate_metric_percase(predicted == label, labels == label) for label in (1, 2)])
    p = Preprocessing(image_size=(20, 24), window=(0.0, 1.0), resize="spline3")

    def run(batch):
        masks = np.stack([outputs.pop(0) for _ in batch])
        return np.stack([masks == label for label in range(3)], 1).astype(np.float32)

    score = evaluate(run, cases, p, TWO_ORGANS, metric="volume_transunet")
    assert score.hd95_unit == "voxels"
    by_class = np.mean(expected, axis=0)  # over the cases
    assert [(mean.dice, mean.hd95) for mean in score.means] == [
        pytest.approx(tuple(item), abs=1e-9) for item in by_class
    ]
    assert (score.mean_dice, score.mean_hd95) == pytest.approx(tuple(by_class.mean(axis=0)), abs=1e-9)
    bar = score.means[1]
    assert (bar.present, bar.missed, bar.false_alarms, bar.absent) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("metric", "figures", "names"),
    [
        ("volume", 2, "Dice / IoU"),
        ("per_image", 2, "Dice / IoU"),
        ("unext_batch", 2, "Dice / IoU"),
        ("volume_transunet", 2, "Dice / HD95 voxels"),
    ],
)
def test_the_table_says_how_was_counted_and_how_often_a_class_was_empty(tmp_path, metric, figures, names):
    data = write_volumes(tmp_path / "data", 3, 4)
    checkpoint = make_checkpoint(tmp_path, architecture="transunet-tiny")
    (board,) = evaluate_all([checkpoint], [], data, ["val"], "auto", metric=metric, batch=3)
    assert board.heading().splitlines()[1].startswith(f"{metric} of 3:" if metric == "unext_batch" else f"{metric}:")
    assert board.header()[1].endswith(names)
    assert len(board.cells()[-1][1].split(" / ")) == figures
    unit = {"per_image": 4, "unext_batch": 2}.get(metric, 1)  # four slices of one case, in batches of three
    header, rows = board.branches()
    assert header[1].endswith("in both / missed / false alarm / absent")
    assert [sum(map(int, row[1].split(" / "))) for row in rows] == [unit, unit]
    assert board.to_dict()["metric"] == metric


def test_evaluate_refuses_hd95_for_unext_batch_and_unknown_metrics(tmp_path):
    with pytest.raises(UsageError, match="unext_batch has no HD95; choose --metric volume"):
        evaluate_all([], [], tmp_path, ["val"], "auto", hd95=True, metric="unext_batch")
    with pytest.raises(UsageError, match="volume, per_image, unext_batch, volume_transunet"):
        evaluate_all([], [], tmp_path, ["val"], "auto", metric="pooled")
