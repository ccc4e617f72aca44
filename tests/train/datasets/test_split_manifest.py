"""The splits of a run are written with digests, travel in its checkpoint, and can be given back."""

import json
import shutil

import pytest
from official import write_busi, write_colondb
from tiny import tiny_recipe, write_block

from medseg_trt.errors import InputError
from medseg_trt.files import sha256
from medseg_trt.train import runs
from medseg_trt.train.checkpoint import load_checkpoint
from medseg_trt.train.datasets.folder import manifest_sha256
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.datasets.options import DataOptions, with_changes
from medseg_trt.train.datasets.split_manifest import read_order, read_split_manifest
from medseg_trt.train.loop import train
from medseg_trt.train.provenance import DataRecord, Provenance
from medseg_trt.train.recorded_data import open_recorded, recorded_options

ANY = DataOptions(count="any")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def busi(tmp_path_factory):
    """A generated BUSI; do not write to it."""
    return write_busi(tmp_path_factory.mktemp("busi"))


@pytest.fixture(scope="module")
def run(busi, tmp_path_factory):
    """A run folder, trained for no epoch on another split than the default."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe("train.epochs=0", "data.count=any", "data.split_seed=7", "data.masks=first")
    data = open_dataset(None, busi, recipe.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "draw_curve", lambda history, path: None)
        return train(recipe, data, folder / "run", block=write_block(folder)).parent


def names(data):
    return {split: [case.name for case in cases] for split, cases in data.splits.items()}


def test_a_run_writes_its_splits_with_the_digest_of_every_file(busi, run):
    written = json.loads((run / "data.json").read_text())
    data = open_dataset(None, busi, DataOptions(count="any", split_seed=7, masks="first"))
    assert written["splits"] == names(data)
    assert written["how"] == {
        "dataset": "busi",
        "order": "natural",
        "masks": "first",
        "normals": "exclude",
        "split_seed": 7,
        "group_by": "none",
    }
    assert len(written["files"]) == 2 * 18  # masks after the first are no part of it
    for name, digest in written["files"].items():
        assert sha256(busi / name) == digest


def test_the_checkpoint_holds_the_same_manifest(run):
    recorded = load_checkpoint(run / "best.pt").provenance.data
    assert recorded is not None
    assert recorded.manifest is not None
    assert recorded.manifest == json.loads((run / "data.json").read_text())
    assert manifest_sha256(recorded.manifest) == recorded.sha256


def test_the_digest_is_the_same_everywhere_and_changes_with_the_split(busi, tmp_path):
    first = manifest_sha256(open_dataset(None, busi, ANY).manifest())
    moved = shutil.copytree(busi, tmp_path / "elsewhere")
    assert manifest_sha256(open_dataset(None, moved, ANY).manifest()) == first
    assert manifest_sha256(open_dataset(None, moved, DataOptions(count="any", split_seed=42)).manifest()) != first


def test_a_manifest_gives_the_same_splits_and_the_same_digest(busi, run):
    manifest = run / "data.json"
    data = open_dataset(None, busi, DataOptions(count="any", masks="first", manifest=str(manifest)))
    assert names(data) == json.loads(manifest.read_text())["splits"]
    assert manifest_sha256(data.manifest()) == manifest_sha256(json.loads(manifest.read_text()))


def test_a_model_is_evaluated_on_the_split_it_was_trained_with(busi, run):
    provenance = load_checkpoint(run / "best.pt").provenance
    assert provenance.data is not None
    assert provenance.data.manifest is not None
    assert names(open_recorded(busi, provenance)) == provenance.data.manifest["splits"]
    assert names(open_recorded(busi, provenance)) != names(open_dataset(None, busi, ANY))


@pytest.mark.usefixtures("no_curve")
def test_splits_that_a_manifest_gave_need_no_file_once_they_are_in_the_checkpoint(busi, run, tmp_path):
    manifest = shutil.copy(run / "data.json", tmp_path / "splits.json")
    recipe = tiny_recipe("train.epochs=0", "data.count=any", "data.masks=first", f"data.manifest={manifest}")
    best = train(recipe, open_dataset(None, busi, recipe.data), tmp_path / "run", block=write_block(tmp_path))
    (tmp_path / "splits.json").unlink()
    provenance = load_checkpoint(best).provenance
    assert names(open_recorded(busi, provenance)) == json.loads((run / "data.json").read_text())["splits"]


def test_a_bundle_asks_for_the_manifest_that_it_does_not_hold(busi, run):
    manifest = run / "data.json"
    options = {"count": "any", "masks": "first", "manifest": "data.json"}
    provenance = Provenance(recipe={"data": options}, data=DataRecord(name="BUSI"))
    with pytest.raises(InputError, match=r"splits of data.json, which is not in it.*--set data.manifest=FILE"):
        open_recorded(busi, provenance)
    chosen = with_changes(recorded_options(provenance), (f"data.manifest={manifest}",))
    assert names(open_recorded(busi, provenance, chosen)) == json.loads(manifest.read_text())["splits"]


def test_a_changed_file_is_named(busi, run, tmp_path):
    moved = shutil.copytree(busi, tmp_path / "busi")
    options = DataOptions(count="any", masks="first", manifest=str(run / "data.json"))
    shutil.copy(moved / "benign" / "benign (2).png", moved / "benign" / "benign (5).png")
    with pytest.raises(InputError, match=r"benign \(5\).png is not the file of .*data.json \(1 such"):
        open_dataset(None, moved, options)


def test_other_masks_are_other_files(busi, run):
    with pytest.raises(InputError, match=r"_mask_1.png is not the file of .*\(3 such"):
        open_dataset(None, busi, DataOptions(count="any", manifest=str(run / "data.json")))


def test_the_manifest_of_another_data_set_is_named(run, tmp_path):
    root, options = write_colondb(tmp_path, 20), DataOptions(count="any", manifest=str(run / "data.json"))
    with pytest.raises(InputError, match=r"data.json names (benign|malignant) \(\d+\), which is not in .*18 such"):
        open_dataset("colondb", root, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "split manifest is the data.json of a run folder"),
        ('{"splits": {}}', "SplitManifest classes"),
        ('{"classes": ["a", "b"], "splits": {}, "files": {}, "more": 1}', "more"),
        ('{"classes": ["a", "b"], "splits": {}, "files": {}}', "of the classes a, b, but"),
    ],
)
def test_invalid_split_manifest_is_refused(busi, tmp_path, content, message):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        open_dataset(None, busi, DataOptions(count="any", manifest=str(path)))


def test_a_manifest_that_is_not_there_is_named(busi, tmp_path):
    with pytest.raises(InputError, match=r"absent.json does not exist"):
        open_dataset(None, busi, DataOptions(count="any", manifest=str(tmp_path / "absent.json")))
    with pytest.raises(InputError, match=r"absent.json does not exist"):
        read_split_manifest(tmp_path / "absent.json")


def test_a_huge_manifest_is_not_read(tmp_path):
    with (tmp_path / "splits.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="larger than 256 MiB"):
        read_split_manifest(tmp_path / "splits.json")


def test_read_order_refuses_duplicates_and_binary_files(tmp_path):
    path = tmp_path / "order.txt"
    path.write_text("b\n\n a \n")
    assert read_order(path) == ["b", "a"]
    path.write_text("a\nb\na\n")
    with pytest.raises(InputError, match="names a case twice: a"):
        read_order(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        read_order(path)
