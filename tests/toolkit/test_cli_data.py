"""An unpacked archive goes from the check through training and evaluation into a bundle, as the commands are typed."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from official import write_busi, write_clinicdb, write_synapse
from tiny import tiny_changes

from medseg_trt.building.provenance import Provenance
from medseg_trt.building.reference_images import reference_images
from medseg_trt.cli import cli
from medseg_trt.errors import InputError, UsageError
from medseg_trt.inspection.describe import describe
from medseg_trt.spec import to_dict
from medseg_trt.train import runs
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.recorded_data import open_recorded


def medseg_trt(*arguments, raises=None):
    """Return what a command prints on stdout."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if raises is None:
        assert done.exception is None, done.stderr
    else:
        assert isinstance(done.exception, raises)
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A generated BUSI and a run folder, trained on it by the command line."""
    root = tmp_path_factory.mktemp("busi")
    data = write_busi(root)
    changes = tiny_changes("architecture=transunet-tiny", "train.epochs=1", "data.count=any", "data.split_seed=5")
    options = [word for change in changes for word in ("--set", change)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_curve", lambda history, path: None)
        medseg_trt("train", "--recipe", "folder", "--data", data, "-o", root / "run", *options)
    return data, root / "run", options


def test_a_good_data_set_ends_with_0_and_a_table(tmp_path):
    printed = medseg_trt("data", "check", write_synapse(tmp_path), "--set", "data.count=any")
    assert "BTCV (Synapse), abdominal organs (img/ and label/ of RawData/Training), order=natural" in printed
    assert "kidney_left" in printed
    assert "nothing is wrong with this data set" in printed


def test_data_check_reports_split_leakage_as_json(tmp_path):
    root = write_clinicdb(tmp_path, kaggle=True)
    printed = medseg_trt("data", "check", root, "--set", "data.count=any", "--json", raises=InputError)
    result = json.loads(printed)
    assert result["problems"][0].startswith("4 patients or sequences are in two splits")
    assert result["how"]["split_seed"] == 41
    medseg_trt("data", "check", root, "--set", "data.count=any", "--set", "data.group_by=sequence")
    medseg_trt("data", "check", root, "--set", "data.counts=any", raises=UsageError)


def test_an_archive_is_evaluated_as_it_was_trained_on(trained):
    data, run, _ = trained
    result = json.loads(medseg_trt("evaluate", "--ckpt", run / "best.pt", "--data", data, "--split", "test", "--json"))
    scored = next(iter(result["splits"][0]["networks"].values()))
    assert [case["case"] for case in scored["cases"]] == json.loads((run / "data.json").read_text())["splits"]["test"]


def test_the_splits_of_a_run_are_given_back(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "draw_curve", lambda history, path: None)
    data, run, options = trained
    again = [word.replace("split_seed=5", "split_seed=41").replace("epochs=1", "epochs=0") for word in options]
    arguments = ("--recipe", "folder", "--data", data, "-o", tmp_path / "again", "--split-manifest", run / "data.json")
    medseg_trt("train", *arguments, *again)
    assert (tmp_path / "again" / "data.json").read_bytes() == (run / "data.json").read_bytes()


def test_a_build_is_verified_on_the_archive_and_its_bundle_names_no_case_of_it(trained):
    data, run, _ = trained
    checkpoint = load_checkpoint(run / "best.pt")
    images = reference_images(checkpoint, None)
    assert images.description.endswith("real images of BUSI, breast ultrasound, split val")
    cases = open_recorded(data, checkpoint.provenance).splits["val"]
    assert images.judged.cases == tuple(case.name for case in cases)
    told = json.dumps(to_dict(Provenance.of(checkpoint, run / "best.pt")))
    for private in (str(data), "Dataset_BUSI", *images.judged.cases):
        assert private not in told
    assert checkpoint.provenance.data is not None
    assert str(checkpoint.provenance.data.sha256) in told


def test_the_place_of_a_split_manifest_is_not_in_a_bundle(trained):
    data, run, _ = trained
    checkpoint = load_checkpoint(run / "best.pt")
    recipe = checkpoint.provenance.recipe
    assert recipe is not None
    options = {**recipe["data"], "manifest": str(run / "data.json")}
    given = replace(checkpoint, provenance=replace(checkpoint.provenance, recipe={**recipe, "data": options}))
    told = to_dict(Provenance.of(given, run / "best.pt"))
    assert told["provenance"]["recipe"]["data"]["manifest"] == "data.json"
    assert str(data.parent) not in json.dumps(told)


def test_a_description_counts_cases_instead_of_listing_them(trained):
    _, run, _ = trained
    described = describe(str(run / "best.pt"), 32, 1).to_dict()["provenance"]["data"]["manifest"]
    assert described == {"splits": {"train": 11, "val": 3, "test": 4}}


def test_data_of_another_set_are_read_as_is_asked_for(trained, tmp_path):
    _, run, _ = trained
    other = write_clinicdb(tmp_path)
    shutil.move(other / "Original", other / "images")
    shutil.move(other / "Ground Truth", other / "masks")
    arguments = ("evaluate", "--ckpt", run / "best.pt", "--data", other, "--split", "test", "--json")
    result = json.loads(medseg_trt(*arguments, "--set", "data.dataset=clinicdb"))
    assert result["splits"][0]["title"].startswith("CVC-ClinicDB, polyps, split test")
