"""A network that was trained on windows: what is built, judged and run are its windows, without an option."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from session_here import SessionHere
from stored_bundle import edit_manifest
from tiny import LESION, make_checkpoint, write_pictures

from medseg_trt.bench import timed_session
from medseg_trt.bench.accuracy import compare_all
from medseg_trt.building import executions, postprocessing
from medseg_trt.building.contract import Contract
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import MAX_JUDGED_WINDOWS, reference_images
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.evaluate import evaluate_all
from medseg_trt.imaging.images import Image, read_image
from medseg_trt.imaging.segment import segment
from medseg_trt.pipeline import build, infer
from medseg_trt.postprocess.steps import ClassSteps, Gain, Postprocessing
from medseg_trt.processes import Connection
from medseg_trt.serve.batching import BatchQueue
from medseg_trt.serve.model import ServedModel
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec, Preprocessing, to_dict
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import AsRecorded, Tiles, recorded_tiles
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from medseg_trt.window_spec import Windows

WINDOWS = Windows(overlap=0.5)
SIZE = (70, 61)  # of the pictures, whose windows are 32 x 32


def trained_on(windows: Windows | None, folder: Path, spacing_mm: float | None = None) -> Path:
    """Write a checkpoint of random weights that says what it was trained on; all have the same weights."""
    path = make_checkpoint(folder, classes=LESION, architecture="transunet-tiny")
    checkpoint = load_checkpoint(path)
    preprocessing = replace(checkpoint.preprocessing, windows=windows, spacing_mm=spacing_mm)
    weights = {**checkpoint.weights, "head.bias": checkpoint.weights["head.bias"] + 1}  # half of the pixels get label 1
    save_checkpoint(replace(checkpoint, weights=weights, preprocessing=preprocessing), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"), count=5, size=SIZE)


@pytest.fixture(scope="module")
def bundles(data, tmp_path_factory) -> tuple[Path, Path]:
    """Bundles of the same network, with windows on record and without."""
    folder, spec = tmp_path_factory.mktemp("bundles"), BuildSpec(backend="onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executions, "ChildSession", SessionHere)
        made = [
            build(trained_on(windows, folder / name), spec, data=data / "images").folder
            for name, windows in (("windows", WINDOWS), ("whole", None))
        ]
    return made[0], made[1]


def masks(bundle: Path, data: Path, folder: Path, *options: str) -> dict[str, bytes]:
    command = ["infer", str(data / "images"), "--bundle", str(bundle), "-o", str(folder), "--threads", "1", *options]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_infer_without_a_flag_cuts_the_recorded_windows(bundles, data, tmp_path, caplog):
    windows, whole = bundles
    recorded = masks(windows, data, tmp_path / "a")
    assert len(recorded) == 5
    assert recorded == masks(whole, data, tmp_path / "b", "--tile", "auto", "--overlap", "0.5")
    assert recorded != masks(whole, data, tmp_path / "c")
    assert "was trained on" not in caplog.text
    assert masks(windows, data, tmp_path / "d", "--tile", "off") == masks(whole, data, tmp_path / "e")
    assert "the network was trained on windows of auto pixels, overlap 0.5, and masks are made of whole" in caplog.text
    caplog.clear()
    assert masks(windows, data, tmp_path / "f", "--tile", "48") == masks(whole, data, tmp_path / "g", "--tile", "48")
    assert "masks are made of windows of 48 pixels, overlap 0.25, as asked" in caplog.text
    other = masks(windows, data, tmp_path / "h", "--overlap", "0")
    assert other == masks(whole, data, tmp_path / "i", "--tile", "auto", "--overlap", "0")


def test_without_a_record_a_scale_or_an_overlap_needs_windows(bundles, data):
    for choice, words in ((AsRecorded(mpp=1.0), "--mpp is the scale"), (AsRecorded(overlap=0.1), "--overlap is that")):
        with pytest.raises(UsageError, match=words):
            next(infer([data / "images"], bundles[1], tiles=choice))
    result = CliRunner().invoke(cli, ["infer", str(data), "--bundle", str(bundles[0]), "--tile", "off", "--mpp", "1"])
    assert "--tile off cuts no windows" in f"{result.output}{result.exception}"


def test_post_processing_follows_the_masks_that_it_was_learnt_on(bundles):
    gain = Gain(before=0.5, after=0.6, low=0.1, high=0.1, units="cases")
    post = Postprocessing(
        kind="image",
        unit="share",
        classes=(ClassSteps(name="lesion", largest=True, gain=gain),),
        gain=gain,
        cases=5,
        slices=5,
        description="generated",
    )
    for folder, as_learnt, other in ((bundles[0], Tiles(overlap=0.5), None), (bundles[1], None, Tiles(overlap=0.5))):
        loaded = load_bundle(folder)
        bundle = replace(loaded, content=replace(loaded.content, postprocessing=post))
        assert bundle.postprocessing == post
        assert replace(bundle, tiles=as_learnt).postprocessing == post
        assert replace(bundle, tiles=other).postprocessing is None
        assert replace(bundle, tiles=Tiles(size=48)).postprocessing is None
        assert replace(bundle, raw_masks=True).postprocessing is None
        if as_learnt is not None:
            assert replace(bundle, tiles=replace(as_learnt, mpp=1.0)).postprocessing == post  # the image's scale


def test_the_graphs_are_compared_on_windows_and_inspect_says_so(bundles):
    windows, whole = map(load_bundle, bundles)
    assert windows.content.preprocessing.windows == WINDOWS
    assert windows.default.verification.images == "8 windows of 1 real images of images"
    assert whole.default.verification.images == "1 real images of images"
    for folder, words in ((bundles[0], "windows of auto pixels, overlap 0.5"), (bundles[1], "whole slices")):
        for path in (folder, folder.parent / "model.pt"):
            assert f"input: {words}" in CliRunner().invoke(cli, ["inspect", str(path)]).output


def test_graphs_that_make_masks_themselves_are_refused(data, tmp_path):
    with pytest.raises(UsageError, match="leave --outputs mask out"):
        build(trained_on(WINDOWS, tmp_path), BuildSpec(outputs="mask"), data=data)


def brightness(batch: np.ndarray) -> np.ndarray:
    return batch[:, :1] - 0.5


def fails_on_windows(batch: np.ndarray) -> np.ndarray:
    """Call everything background where an input is of one half of the pictures alone."""
    narrow = np.ptp(batch.mean(axis=(1, 2)), axis=-1) < 0.5
    return np.where(narrow[:, np.newaxis, np.newaxis, np.newaxis], -1.0, brightness(batch)).astype(np.float32)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """Pictures of which the left half is dark and the right half is bright and of class 1."""
    folder = tmp_path_factory.mktemp("halves")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        labels = np.zeros((96, 192), np.uint8)
        labels[:, 96:] = 255
        noise = rng.integers(0, 50, labels.shape)
        PIL.Image.fromarray(np.where(labels > 0, 200 + noise, noise).astype(np.uint8)).save(
            folder / "images" / f"{number:02}.png"
        )
        PIL.Image.fromarray(labels).save(folder / "masks" / f"{number:02}.png")
    return folder


def judge(checkpoint: Checkpoint, data: Path) -> Reference:
    images = reference_images(checkpoint, data)
    return Reference(network=brightness, contract=Contract.of(checkpoint), images=images, spec=BuildSpec())


def test_the_gate_judges_windows_and_one_of_whole_slices_would_let_a_fault_pass(halves, tmp_path):
    of_windows = judge(load_checkpoint(trained_on(WINDOWS, tmp_path / "a")), halves)
    verdict, figures = of_windows.verdict(fails_on_windows)
    assert not verdict.holds
    assert verdict.reference > 0.99
    assert figures["num_images"] == len(of_windows.images.judged.inputs) > verdict.images
    assert of_windows.verdict(brightness)[0].holds
    of_whole = judge(load_checkpoint(trained_on(None, tmp_path / "b")), halves)
    assert of_whole.verdict(fails_on_windows)[0].holds  # the planted fault: whole resized slices say nothing of windows


def test_post_processing_is_learnt_on_masks_of_windows(halves, tmp_path, monkeypatch, caplog):
    reference = judge(load_checkpoint(trained_on(WINDOWS, tmp_path)), halves)
    seen = []

    def counted(batch: np.ndarray) -> np.ndarray:
        seen.extend(batch)
        return brightness(batch)

    reference.network = counted
    postprocessing.learn(reference)
    assert len(seen) == 6 * 5 * 11  # pictures of the validation split, and the windows of each
    monkeypatch.setattr(postprocessing, "MAX_RUNS", 54)
    with caplog.at_level("INFO"):
        assert postprocessing.learn(reference) is None
    assert "the first case takes more than 54 runs" in caplog.text


def test_judged_masks_are_those_that_inference_makes(data, tmp_path):
    checkpoint = load_checkpoint(trained_on(WINDOWS, tmp_path))
    judged = reference_images(checkpoint, data).judged
    assert judged.truths is not None
    made = judged.masks(brightness(judged.inputs), checkpoint.preprocessing)
    for name, mask, truth in zip(judged.cases, made, judged.truths, strict=True):
        image = read_image(data / "images" / f"{name}.png")
        tiles = recorded_tiles(checkpoint.preprocessing)
        assert tiles is not None
        (expected,) = tiled(brightness, image, checkpoint.preprocessing, tiles)(image.pixels)
        np.testing.assert_array_equal(mask, expected)
        assert mask.shape == truth.shape == SIZE


def test_large_pictures_are_judged_in_part_and_few_enough_windows(tmp_path):
    data = write_pictures(tmp_path / "data", count=40, size=(200, 150))
    (data / "masks" / "case39.png").write_bytes((data / "masks" / "case0.png").read_bytes())
    checkpoint = load_checkpoint(trained_on(WINDOWS, tmp_path))
    judged = reference_images(checkpoint, data / "images").judged
    part = 32 + 3 * 16
    assert set(judged.sizes) == {(part, part)}
    assert len(judged.inputs) == 16 * len(judged.sizes) <= MAX_JUDGED_WINDOWS
    labelled = reference_images(checkpoint, data).judged
    assert labelled.truths is not None
    assert all(truth.any() for truth in labelled.truths)  # about the lesion


def test_evaluate_scores_the_recorded_windows(bundles, data):
    def dice(bundle: Path, **options: Tiles | AsRecorded | None) -> tuple[str, float]:
        (board,) = evaluate_all([], [bundle], data, ["train"], "auto", **options)  # pyright: ignore[reportArgumentType]
        ((name, evaluation),) = board.evaluations.items()
        return name.partition("(")[2], evaluation.mean_dice

    windows, whole = bundles
    name, score = dice(windows)
    assert name.endswith("windows of auto pixels, overlap 0.5")
    assert score == dice(whole, tiles=Tiles(overlap=0.5))[1]
    name, off = dice(windows, tiles=None)
    assert name.endswith("whole slices")
    assert off == dice(whole)[1] != score
    with pytest.raises(UsageError, match="--tile off"):
        evaluate_all([], [windows], data, ["train"], "auto", metric="per_image")
    evaluate_all([], [windows], data, ["train"], "auto", metric="per_image", tiles=None)


def test_evaluate_with_a_scale_is_infer_with_it(data, tmp_path):
    path = trained_on(WINDOWS, tmp_path / "a", spacing_mm=0.5)
    command = ["evaluate", "--ckpt", str(path), "--data", str(data), "--split", "train", "--json"]

    def scored(*options: str) -> float:
        result = CliRunner().invoke(cli, [*command, *options])
        assert result.exit_code == 0, result.output
        (network,) = json.loads(result.stdout)["splits"][0]["networks"].values()
        return network["mean_dice"]

    assert scored("--mpp", "500") == scored() == scored("--tile", "32", "--overlap", "0.5")  # 0.5 mm, as the network
    assert scored("--mpp", "250") == scored("--tile", "64", "--overlap", "0.5") != scored()  # twice the pixels


@pytest.fixture
def served(bundles) -> Iterator[ServedModel]:
    bundle = load_bundle(bundles[0])
    session = open_session(bundle, "onnxruntime", 1)
    queue = BatchQueue(max_batch=8, delay_s=0.0, max_requests=4)
    model = ServedModel(
        name="tiny", digest="0" * 64, bundle=bundle, session=session, queue=queue, shares_runs=True, _numbers=count()
    )
    yield model
    model.close()


def test_a_server_makes_the_masks_of_infer(served, bundles, data):
    image = read_image(data / "images" / "case0.png")
    (expected,) = infer([image.path], bundles[0], backend="onnxruntime", threads=1)
    with served.queue.open() as request:
        made = served.segment(image, request)
    np.testing.assert_array_equal(made.labels, expected.labels)
    assert served.outside_fraction(image) == 0


def test_bench_compares_masks_of_windows():
    contract = Preprocessing(image_size=(32, 32), windows=WINDOWS)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 1)).astype(np.uint8)
    image = Image(path=Path("a"), pixels=pixels)
    tiles = recorded_tiles(contract)
    assert tiles is not None
    labels = segment(brightness, image, contract, 1, pixels_to_masks=tiled(brightness, image, contract, tiles))
    cases = [("a", image, labels)]
    scores = compare_all(
        {"reference": brightness, "other": fails_on_windows},
        cases,
        contract,
        LESION,
        lambda *_: None,
        lambda _image, made: made,
    )
    assert [slices.counts for slices in scores.networks["reference"].slices] == [
        (tuple([int((of_slice == 1).sum())] * 3),) for of_slice in labels
    ]
    assert scores.networks["other"].same_labels < scores.networks["other"].all_labels


def test_bench_times_the_mask_of_infer(served, bundles, data, tmp_path, monkeypatch):
    image, made = data / "images" / "case0.png", []
    monkeypatch.setattr(timed_session, "write_mask", lambda mask, _folder: made.append(mask))
    case = {
        "image": str(image),
        "preprocessing": to_dict(served.bundle.preprocessing),
        "classes": to_dict(LESION),
        "output": str(tmp_path),
    }
    connection = Connection.__new__(Connection)  # nothing is sent
    timed_session.CALLS["end_to_end"](served.session, connection, case=case, duration_s=0.0, min_runs=1)
    (expected,) = infer([image], bundles[0], backend="onnxruntime", threads=1)
    np.testing.assert_array_equal(made[0].labels, expected.labels)


def test_edited_windows_of_a_bundle_are_refused(bundles, tmp_path):
    for number, (change, words) in enumerate(
        [
            ({"overlap": 2.0}, "must be from 0 to less than 1"),
            ({"overlap": 0.25}, "preprocessor_config.json differ in windows"),
            ({"size": "large"}, "windows.size"),
        ]
    ):
        folder = tmp_path / f"{number}.medseg"
        shutil.copytree(bundles[0], folder)
        edit_manifest(folder, lambda manifest, change=change: manifest["preprocessing"]["windows"].update(change))
        with pytest.raises(ArtefactError, match=words):
            load_bundle(folder)
