"""What a bundle stores of post-processing and of its training images, on the way of ``infer`` and ``evaluate``."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from stored_bundle import edit_manifest
from tiny import picture, write_nifti, write_volumes

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError
from medseg_trt.evaluate import evaluate_all
from medseg_trt.guard.learn import learn_guard
from medseg_trt.imaging.images import read_image
from medseg_trt.pipeline import infer
from medseg_trt.postprocess.apply import postprocess
from medseg_trt.postprocess.steps import ClassSteps, Gain, Postprocessing
from medseg_trt.spec import Preprocessing, to_dict

GAIN = Gain(before=0.5, after=0.6, low=0.05, high=0.15, units="cases")
POST = Postprocessing(
    kind="volume",
    unit="mm3",
    classes=(ClassSteps(name="disc", largest=True, gain=GAIN), ClassSteps(name="bar", min_size=200.0, gain=GAIN)),
    gain=GAIN,
    cases=5,
    slices=25,
    description="generated, split val",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_volumes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def corrected_bundle(tiny_bundle, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "model.medseg"
    shutil.copytree(tiny_bundle, folder)
    images = [read_image(data / "images" / f"scan{index}.nii.gz") for index in range(2)]
    guard = learn_guard(images[:1], images[1:], Preprocessing(image_size=(32, 32)))
    edit_manifest(folder, lambda manifest: manifest.update(postprocessing=to_dict(POST), guard=to_dict(guard)))
    return folder


def run(*arguments) -> tuple[dict, str]:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_infer_corrects_masks_and_keeps_them_raw_on_request(corrected_bundle, tiny_bundle, data):
    scan = data / "images" / "scan1.nii.gz"
    (raw,), (without,) = infer([scan], tiny_bundle), infer([scan], corrected_bundle, postprocess=False)
    np.testing.assert_array_equal(without.labels, raw.labels)
    (corrected,) = infer([scan], corrected_bundle)
    expected = postprocess(raw.labels, POST, raw.classes, raw.spacing_mm)
    np.testing.assert_array_equal(corrected.labels, expected)
    assert (expected != raw.labels).any()


def test_continue_redoes_masks_of_another_post_processing_choice(corrected_bundle, data, tmp_path):
    command = ["infer", data / "images", "--bundle", corrected_bundle, "-o", tmp_path / "masks", "--continue"]
    assert run(*command)[0]["kept"] == 0
    assert run(*command)[0]["kept"] == 2
    assert run(*command, "--no-postprocess")[0]["kept"] == 0


def test_ensemble_masks_are_not_post_processed_and_this_is_logged(corrected_bundle, data, caplog):
    scan = data / "images" / "scan1.nii.gz"
    (mask,) = infer([scan], corrected_bundle, ensemble=[corrected_bundle])
    (raw,) = infer([scan], corrected_bundle, postprocess=False)
    np.testing.assert_array_equal(mask.labels, raw.labels)
    assert "masks are not post-processed: the steps were learnt on one network's masks" in caplog.text


def test_evaluate_scores_the_masks_of_infer(corrected_bundle, tiny_bundle, data, caplog):
    def dice(bundle, **options):
        (board,) = evaluate_all([], [bundle], data, ["val"], "auto", **options)
        ((name, evaluation),) = board.evaluations.items()
        return name, [mean.dice for mean in evaluation.means]

    raw = dice(tiny_bundle)[1]
    name, corrected = dice(corrected_bundle)
    assert "post-processed" in name
    assert corrected != raw
    assert dice(corrected_bundle, postprocess=False)[1] == raw
    dice(corrected_bundle, metric="per_image")
    assert "which are not post-processed" in caplog.text


def test_an_unlike_image_is_named_in_the_log_the_table_and_json_and_its_mask_stays(
    corrected_bundle, tiny_bundle, data, tmp_path, caplog
):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(data / "images" / "scan1.nii.gz", images)
    pixels = np.stack([255 - picture(seed, (36, 28))[0] for seed in range(5)])
    write_nifti(images / "inverted.nii.gz", pixels.transpose(2, 1, 0)[::-1, ::-1])
    result, _ = run("infer", images, "--bundle", corrected_bundle, "-o", tmp_path / "masks", "--no-postprocess")
    ((path, reason),) = result["unusual"].items()
    assert path.endswith("inverted.nii.gz")
    assert "intensities" in reason
    assert f"inverted.nii.gz is unlike the training images: {reason}" in caplog.text
    with (tmp_path / "masks" / "areas.csv").open(newline="", encoding="utf-8") as file:
        named = {row["file"]: row["unusual"] for row in csv.DictReader(file)}
    assert named == {"inverted.nii.gz": reason, "scan1.nii.gz": ""}
    (mask,) = infer([images / "inverted.nii.gz"], tiny_bundle)
    assert mask.unusual is None  # this bundle knows nothing of its training images
    (same,) = infer([images / "inverted.nii.gz"], corrected_bundle, postprocess=False)
    np.testing.assert_array_equal(same.labels, mask.labels)
    again, _ = run(
        "infer", images, "--bundle", corrected_bundle, "-o", tmp_path / "masks", "--no-postprocess", "--continue"
    )
    assert again["kept"] == 2
    assert again["unusual"] == result["unusual"]
    tree, _ = run("infer", images, "--tree", "--bundle", corrected_bundle, "-o", tmp_path / "tree")
    assert tree["unusual"] == 1  # an archive may have millions


def test_a_class_that_the_network_does_not_know_is_refused(corrected_bundle, tmp_path):
    folder = tmp_path / "model.medseg"
    shutil.copytree(corrected_bundle, folder)
    other = replace(POST, classes=(ClassSteps(name="liver", largest=True, gain=GAIN),))
    edit_manifest(folder, lambda manifest: manifest.update(postprocessing=to_dict(other)))
    with pytest.raises(ArtefactError, match="liver, which the network does not know"):
        load_bundle(folder)


def test_inspect_shows_the_steps_and_the_guard(corrected_bundle):
    result = CliRunner().invoke(cli, ["inspect", str(corrected_bundle)])
    assert result.exit_code == 0, result.output
    assert "post-processing, chosen on generated, split val" in result.output
    assert "largest component" in result.output
    assert "held-out slices of 1 case(s)" in result.output
