import json

import numpy as np
import pytest
from tiny import LESION, make_checkpoint, write_pictures, write_volumes

from medseg_trt.errors import InputError, UsageError
from medseg_trt.evaluate import evaluate_all
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.metrics.hausdorff import hd95
from medseg_trt.pipeline import infer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_volumes(tmp_path_factory.mktemp("data"))


def test_checkpoint_and_bundle_stand_side_by_side_with_the_same_figures(tiny_bundle, data):
    checkpoint = tiny_bundle.parent / "model" / "model.pt"
    (board,) = evaluate_all([checkpoint], [tiny_bundle], data, ["val"], "auto")
    from_checkpoint, from_bundle = board.evaluations.values()
    image = read_image(data / "images" / "scan1.nii.gz")
    truth = read_labels(data / "masks" / "scan1.nii.gz", image, 3)
    (mask,) = infer([data / "images" / "scan1.nii.gz"], tiny_bundle)
    for label, score, again in zip((1, 2), from_bundle.means, from_checkpoint.means, strict=True):
        true, predicted = truth == label, mask.labels == label
        assert score.dice == pytest.approx(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))
        assert score.iou == pytest.approx((true & predicted).sum() / (true | predicted).sum())
        assert again.dice == pytest.approx(score.dice, abs=1e-3)  # a tie may fall the other way in a pixel
    assert board.header()[1:] == [
        "model/model.pt (pytorch)\nDice / IoU",
        f"{tiny_bundle.parent.name}/model.medseg (onnxruntime)\nDice / IoU",
    ]
    assert [row[0] for row in board.cells()] == ["disc", "bar", "mean"]


def test_evaluation_title_names_data_set_and_split(tiny_bundle, data):
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto")
    assert board.title == "generated, split val (generated shapes)"
    assert json.loads(json.dumps(board.to_dict()))["split"] == "val"


def test_networks_with_equal_short_names_are_evaluated_separately(tmp_path, data):
    architectures = {"a": "transunet-tiny", "b": "llm-transunet-tiny"}
    paths = [make_checkpoint(tmp_path / folder / "run", architecture=name) for folder, name in architectures.items()]
    (board,) = evaluate_all(paths, [], data, ["val"], "auto")
    assert list(board.evaluations) == [f"{path} (pytorch)" for path in paths]
    alone = [evaluate_all([path], [], data, ["val"], "auto")[0] for path in paths]
    assert list(board.evaluations.values()) == [result for single in alone for result in single.evaluations.values()]
    assert len({evaluation.means for evaluation in board.evaluations.values()}) == 2


def test_an_absent_class_is_shown_as_absent(tiny_bundle, tmp_path):
    data = write_volumes(tmp_path)
    import nibabel

    path = data / "masks" / "scan1.nii.gz"
    volume = nibabel.Nifti1Image.from_filename(path)
    without_bar = np.asarray(volume.dataobj) * (np.asarray(volume.dataobj) != 2)
    nibabel.save(nibabel.Nifti1Image(without_bar.astype(np.uint8), volume.affine), path)
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto")
    cells = dict(board.cells())
    assert cells["bar"] in ("absent", "absent, false alarm")
    (evaluation,) = board.evaluations.values()
    assert float(cells["mean"].split(" / ")[0]) == pytest.approx(
        evaluation.means[0].dice, abs=5e-4
    )  # the absent class is in no mean


def test_other_classes_than_the_datas_are_refused(tmp_path, data):
    checkpoint = make_checkpoint(tmp_path, classes=LESION, architecture="transunet-tiny")
    with pytest.raises(UsageError, match="knows the classes background, lesion"):
        evaluate_all([checkpoint], [], data, ["val"], "auto")


def test_an_unknown_split_lists_the_known_ones(tiny_bundle, data):
    with pytest.raises(InputError, match="train, val"):
        evaluate_all([], [tiny_bundle], data, ["test"], "auto")


def test_distances_are_in_millimetres_of_the_scan_and_in_pixels_of_a_picture(tiny_bundle, data, tmp_path):
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto", hd95=True)
    (evaluation,) = board.evaluations.values()
    image = read_image(data / "images" / "scan1.nii.gz")
    truth = read_labels(data / "masks" / "scan1.nii.gz", image, 3)
    (mask,) = infer([data / "images" / "scan1.nii.gz"], tiny_bundle)
    for label, mean in zip((1, 2), evaluation.means, strict=True):
        assert mean.hd95 == pytest.approx(hd95(mask.labels == label, truth == label, (3.0, 1.5, 2.0)))
    assert board.header()[1].endswith("Dice / IoU / HD95 mm")
    assert board.cells()[0][1].count("/") == 2

    images = write_pictures(tmp_path / "pictures", count=3)
    checkpoint = make_checkpoint(tmp_path, classes=LESION, architecture="transunet-tiny")
    (board,) = evaluate_all([checkpoint], [], images, ["val"], "auto", hd95=True)
    (evaluation,) = board.evaluations.values()
    assert evaluation.hd95_unit == "pixels"
    for case in evaluation.cases:
        assert case.scores[0].hd95 is None or 0 <= case.scores[0].hd95 < 46  # the diagonal of 32 x 32 pixels


def test_augmentation_is_scored_beside_the_network_with_its_cost(tiny_bundle, data):
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto", tta="flips")
    plain, augmented = board.evaluations
    assert augmented == f"{plain}, tta flips"
    assert list(board.costs) == [plain, augmented]
    assert board.costs[augmented] > board.costs[plain] > 0  # four runs for one
    (line,) = board.cost_lines()
    assert line.startswith(f"{augmented}: Dice {board.evaluations[plain].mean_dice:.4f} → ")
    assert json.loads(json.dumps(board.to_dict()))["ms_per_slice"] == board.costs


def test_infer_draws_the_masks_that_evaluate_scores_with_augmentation(tiny_bundle, data):
    (board,) = evaluate_all([], [tiny_bundle], data, ["val"], "auto", tta="rot90")
    evaluation = list(board.evaluations.values())[1]
    image = read_image(data / "images" / "scan1.nii.gz")
    truth = read_labels(data / "masks" / "scan1.nii.gz", image, 3)
    (mask,) = infer([data / "images" / "scan1.nii.gz"], tiny_bundle, tta="rot90")
    (plain,) = infer([data / "images" / "scan1.nii.gz"], tiny_bundle)
    assert (mask.labels != plain.labels).any()
    for label, score in zip((1, 2), evaluation.means, strict=True):
        true, predicted = truth == label, mask.labels == label
        assert score.dice == pytest.approx(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))
