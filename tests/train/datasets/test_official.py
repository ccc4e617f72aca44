"""Generated archives of the paper's data sets come out as they lie: pixels, masks, labels, splits, in every layout."""

import logging
import shutil
from itertools import chain

import nibabel
import numpy as np
import PIL.Image
import pytest
from official import (
    SIZE,
    colour_picture,
    load_nifti,
    save_nifti,
    write_acdc,
    write_busi,
    write_clinicdb,
    write_colondb,
    write_isic2017,
    write_synapse,
)
from tiny import LESION, picture, write_description, write_pictures

from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.images import read_image
from medseg_trt.train.datasets import acdc, synapse
from medseg_trt.train.datasets.folder import read_case
from medseg_trt.train.datasets.official import DATASETS, is_labelled, open_dataset
from medseg_trt.train.datasets.options import DataOptions, with_changes
from medseg_trt.train.datasets.splits import paper_split
from medseg_trt.train.provenance import Provenance
from medseg_trt.train.recorded_data import recorded_options

ANY = DataOptions(count="any")
LAYOUTS = {  # name of the layout: data set, what writes it, cases in train, val and test
    "isic2017": ("isic2017", write_isic2017, (6, 3, 3)),
    "busi": ("busi", write_busi, (11, 3, 4)),
    "clinicdb": ("clinicdb", write_clinicdb, (7, 2, 3)),
    "clinicdb, Kaggle": ("clinicdb", lambda root: write_clinicdb(root, kaggle=True), (7, 2, 3)),
    "colondb": ("colondb", write_colondb, (7, 2, 3)),
    "colondb, community": ("colondb", lambda root: write_colondb(root, community=True), (7, 2, 3)),
    "synapse": ("synapse", write_synapse, (3, 0, 2)),
    "synapse, TransUNet": ("synapse", lambda root: write_synapse(root, prepared=True), (9, 0, 2)),
    "acdc": ("acdc", write_acdc, (6, 4, 4)),
    "acdc, SSL4MIS": ("acdc", lambda root: write_acdc(root, prepared=True), (18, 4, 4)),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Every layout, in a folder of its own; do not write there."""
    return {name: write(tmp_path_factory.mktemp("archive")) for name, (_, write, _) in LAYOUTS.items()}


def all_cases(data):
    return list(chain.from_iterable(data.splits.values()))


def names(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_divided(archives, layout):
    name, _, sizes = LAYOUTS[layout]
    data = open_dataset(name, archives[layout], ANY)
    assert tuple(len(data.splits.get(split, ())) for split in ("train", "val", "test")) == sizes
    assert (data.name, data.modality) == (DATASETS[name].title, DATASETS[name].modality)
    for case in all_cases(data):
        image, labels = read_case(case, len(data.classes.names))
        assert image.size == SIZE
        assert set(np.unique(labels)) == set(range(len(data.classes.names)))
        assert image.pixels.min() >= 0 or data.modality == "CT"
        if data.window is not None:
            middle = np.median(image.pixels)
            assert data.window[0] < middle < data.window[1]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "community" not in name])
def test_the_data_set_is_told_by_its_layout(archives, layout, caplog):
    caplog.set_level(logging.INFO, "medseg_trt")
    name, _, _ = LAYOUTS[layout]
    data = open_dataset(None, archives[layout], ANY)
    assert data.how["dataset"] == name
    assert data.splits == open_dataset(name, archives[layout], ANY).splits
    assert f"is read as {DATASETS[name].title}: {data.layout}" in caplog.text


@pytest.mark.parametrize("layout", ["busi", "synapse", "synapse, TransUNet", "acdc"])
def test_data_set_is_found_in_a_sub_folder(archives, layout):
    root = archives[layout]
    assert names(all_cases(open_dataset(LAYOUTS[layout][0], root.parent, ANY))) == names(
        all_cases(open_dataset(LAYOUTS[layout][0], root, ANY))
    )


def test_a_photograph_of_isic_comes_with_its_own_mask_and_without_superpixels(archives):
    data = open_dataset("isic2017", archives["isic2017"], ANY)
    assert names(data.splits["train"]) == [f"ISIC_{number:07d}" for number in range(6)]
    for case in all_cases(data):
        colours, mask = colour_picture(int(case.name.removeprefix("ISIC_")))
        image, labels = read_case(case, 2)
        np.testing.assert_array_equal(labels[0], mask // 255)
        assert np.abs(image.pixels[0].astype(int) - colours).mean() < 8  # JPEG's losses; of another picture 40


def test_folders_within_folders_of_their_own_name_are_passed_through(archives, tmp_path):
    for folder in archives["isic2017"].iterdir():  # as some unpackers leave them
        shutil.copytree(folder, tmp_path / folder.name / folder.name)
    mask = next((tmp_path / "ISIC-2017_Test_v2_Part1_GroundTruth").rglob("*.png"))
    mask.rename(mask.with_suffix(".PNG"))
    opened, expected = (open_dataset("isic2017", root, ANY) for root in (tmp_path, archives["isic2017"]))
    assert [names(cases) for cases in opened.splits.values()] == [names(cases) for cases in expected.splits.values()]


def test_busis_masks_are_merged_or_the_first_is_taken(archives):
    merged, first = (
        {case.name: case for case in all_cases(open_dataset("busi", archives["busi"], options))}
        for options in (ANY, DataOptions(count="any", masks="first"))
    )
    assert merged.keys() == first.keys()
    for name, more in (("benign (1)", 1), ("malignant (1)", 2), ("benign (2)", 0)):
        _, labels = read_case(merged[name], 2)
        _, labels_of_first = read_case(first[name], 2)
        lesion = picture({"benign (1)": 0, "benign (2)": 1, "malignant (1)": 12}[name], SIZE)[1] == 1
        np.testing.assert_array_equal(labels_of_first[0], lesion)
        everything = np.logical_or.reduce([np.roll(lesion, 12 * index, axis=1) for index in range(more + 1)])
        np.testing.assert_array_equal(labels[0], everything)
        assert len(merged[name].files) == 2 + more


def test_busis_masks_of_every_mode_are_read(archives):
    folder = archives["busi"] / "benign"
    modes: set[str] = set()
    for path in folder.glob("*_mask.png"):
        with PIL.Image.open(path) as mask:
            modes.add(mask.mode)
    assert modes == {"1", "L", "RGB", "RGBA"}  # all of them are read in the tests above


def test_busis_normals_are_left_out_or_have_empty_masks(archives):
    without = all_cases(open_dataset("busi", archives["busi"], ANY))
    cases = all_cases(open_dataset("busi", archives["busi"], DataOptions(count="any", normals="include")))
    normal = [case for case in cases if case.name.startswith("normal")]
    assert len(cases) == len(without) + 3
    assert len(normal) == 3
    assert not any(read_case(case, 2)[1].any() for case in normal)


def test_files_are_in_natural_order_before_they_are_divided(archives):
    data = open_dataset("busi", archives["busi"], ANY)
    ordered = [
        f"{kind} ({number})" for kind, count in (("benign", 12), ("malignant", 6)) for number in range(1, count + 1)
    ]
    assert {split: tuple(names(cases)) for split, cases in data.splits.items()} == paper_split(ordered)


def test_the_order_may_be_by_letters_or_from_a_file(archives, tmp_path):
    lexicographic = open_dataset("colondb", archives["colondb"], DataOptions(count="any", order="lexicographic"))
    assert names(lexicographic.splits["test"]) == list(paper_split(sorted(map(str, range(1, 13))))["test"])
    order = [str(number) for number in (7, 3, 12, 1, 2, 4, 5, 6, 8, 9, 10, 11)]
    (tmp_path / "order.txt").write_text("\n".join(order) + "\n")
    options = DataOptions(count="any", order="manifest", manifest=str(tmp_path / "order.txt"))
    assert names(open_dataset("colondb", archives["colondb"], options).splits["test"]) == list(
        paper_split(order)["test"]
    )
    (tmp_path / "order.txt").write_text("\n".join(order[:-1]))
    with pytest.raises(InputError, match=r"order.txt does not name 11 \(1 such case"):
        open_dataset("colondb", archives["colondb"], options)


def test_another_seed_gives_another_split(archives):
    first, second = (
        open_dataset("colondb", archives["colondb"], DataOptions(count="any", split_seed=seed)) for seed in (41, 42)
    )
    assert set(names(all_cases(first))) == set(names(all_cases(second)))
    assert first.splits["test"] != second.splits["test"]


def test_frames_of_one_sequence_stay_together(tmp_path):
    root = write_clinicdb(tmp_path, 30, kaggle=True)
    data = open_dataset("clinicdb", root, DataOptions(count="any", group_by="sequence"))
    groups = [{case.group for case in cases} for cases in data.splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    apart = open_dataset("clinicdb", root, ANY).splits.values()
    assert sum(len({case.group for case in cases}) for cases in apart) > 10  # the paper's own split shares them


def test_sequences_that_nobody_wrote_down_cannot_be_kept_together(archives):
    with pytest.raises(InputError, match=r"needs the sequence of every case.*metadata.csv.*frame_id and sequence_id"):
        open_dataset("clinicdb", archives["clinicdb"], DataOptions(count="any", group_by="sequence"))


def test_clinicdb_prefers_tiff_and_falls_back_to_png(tmp_path):
    root = write_clinicdb(tmp_path, kaggle=True)
    data = open_dataset("clinicdb", root, ANY)
    assert {file.suffix for case in all_cases(data) for file in case.files} == {".tif"}
    shutil.rmtree(root / "TIF")
    only = open_dataset("clinicdb", root, ANY)
    assert {file.suffix for case in all_cases(only) for file in case.files} == {".png"}
    assert {case.group for case in all_cases(only)} == {f"sequence {number}" for number in range(1, 5)}


@pytest.mark.parametrize("masks", ["masks", "masks/0"])
@pytest.mark.parametrize("name", ["busi", "clinicdb", "colondb"])
def test_flat_folders_are_read_as_the_data_set_that_is_named(tmp_path, name, masks):
    write_pictures(tmp_path, 12)
    if masks == "masks/0":  # UNeXt's
        (tmp_path / "masks").rename(tmp_path / "0")
        (tmp_path / "masks").mkdir()
        (tmp_path / "0").rename(tmp_path / "masks" / "0")
    data = open_dataset(name, tmp_path, ANY)
    assert {split: len(cases) for split, cases in data.splits.items()} == {"train": 7, "val": 2, "test": 3}
    for case in all_cases(data):
        np.testing.assert_array_equal(read_case(case, 2)[1][0], picture(int(case.name[4:]))[1] == 1)


def test_grey_borders_of_a_mask_are_cut_at_half(tmp_path):
    write_pictures(tmp_path, 8)
    grey = np.linspace(0, 255, 32 * 32).round().astype(np.uint8).reshape(32, 32)
    PIL.Image.fromarray(grey).save(tmp_path / "masks" / "case3.png")
    cases = {case.name: case for case in all_cases(open_dataset("colondb", tmp_path, ANY))}
    np.testing.assert_array_equal(read_case(cases["case3"], 2)[1][0], grey > 127)


@pytest.mark.parametrize("order", ["transunet", "emcad"])
def test_the_eight_organs_get_their_names_in_either_order(archives, order):
    data = open_dataset("synapse", archives["synapse"], DataOptions(count="any", organs=order))
    assert data.classes.names == synapse.ORGANS[order]
    for case in all_cases(data):
        raw = read_image(case.mask).pixels[..., 0]
        _, labels = read_case(case, 9)
        for number, organ in enumerate(synapse.RAW_LABELS):
            expected = data.classes.names.index(organ) if organ in data.classes.names else 0
            assert set(np.unique(labels[raw == number])) == {expected}


def test_both_orders_hold_the_same_organs_and_differ():
    first, second = synapse.ORGANS["transunet"], synapse.ORGANS["emcad"]
    assert first[0] == second[0] == "background"
    assert sorted(first) == sorted(second)
    assert len(first) == 9
    assert set(first) < set(synapse.RAW_LABELS)
    assert (first.index("liver"), second.index("liver")) == (5, 6)


def test_the_lists_of_synapse_are_transunets():
    assert (len(synapse.TRAIN), len(synapse.TEST)) == (18, 12)
    raw = [f"{number:04d}" for number in (*range(1, 11), *range(21, 41))]
    assert sorted(synapse.TRAIN + synapse.TEST) == raw
    assert synapse.TEST[:3] == ("0008", "0022", "0038")


def test_transunets_slices_and_volumes_come_in_the_order_of_the_lists(archives, tmp_path):
    root = shutil.copytree(archives["synapse, TransUNet"].parents[1], tmp_path / "TransUNet")
    listed = root / "lists" / "lists_Synapse" / "train.txt"
    lines = listed.read_text().split()[::-1]
    listed.write_text("\n".join(lines))
    data = open_dataset("synapse", root, ANY)
    assert names(data.splits["train"]) == lines
    assert names(data.splits["test"]) == ["case0008", "case0022"]
    assert {case.group for case in data.splits["train"]} == {"case0005", "case0006", "case0007"}
    listed.unlink()
    assert names(open_dataset("synapse", root, ANY).splits["train"]) == sorted(lines)


def test_a_raw_scan_is_in_hounsfield_units_and_turned_to_lps(archives, tmp_path):
    data = open_dataset("synapse", archives["synapse"], ANY)
    case = data.splits["train"][0]
    image, labels = read_case(case, 9)
    assert data.window == (-125, 275)
    assert image.spacing_mm == pytest.approx((3, 0.8, 0.8))
    root = shutil.copytree(archives["synapse"], tmp_path / "RawData")  # the same scan, stored from the head down
    for part in ("img", "label"):
        path = root / "Training" / part / f"{part}0005.nii.gz"
        stored = load_nifti(path)
        values = np.asarray(stored.dataobj)[:, :, ::-1]
        affine = stored.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, values.shape[2] - 1], [0, 0, 0, 1]])
        nibabel.save(nibabel.Nifti1Image(values.copy(), affine), path)
    reoriented, reoriented_labels = read_case(open_dataset("synapse", root, ANY).splits["train"][0], 9)
    np.testing.assert_array_equal(reoriented.pixels, image.pixels)
    np.testing.assert_array_equal(reoriented_labels, labels)


def test_the_patients_of_acdc_are_seventy_ten_and_twenty():
    assert {split: len(patients) for split, patients in acdc.PATIENTS.items()} == {"train": 70, "val": 10, "test": 20}
    assert sorted(chain.from_iterable(acdc.PATIENTS.values())) == list(range(1, 101))
    assert (acdc.PATIENTS["test"][0], acdc.PATIENTS["val"][0], acdc.PATIENTS["train"][0]) == (1, 21, 31)


@pytest.mark.parametrize("layout", ["acdc", "acdc, SSL4MIS"])
def test_a_patient_of_acdc_is_in_one_split_and_films_are_left_alone(archives, layout):
    data = open_dataset("acdc", archives[layout], ANY)
    patients = {split: {case.group for case in cases} for split, cases in data.splits.items()}
    assert patients == {
        "train": {"patient031", "patient032", "patient033"},
        "val": {"patient021", "patient022"},
        "test": {"patient001", "patient002"},
    }
    assert not any("4d" in case.name for case in all_cases(data))
    assert data.classes.names == ("background", "right ventricle", "myocardium", "left ventricle")


def test_raw_hearts_have_no_window_in_common_and_prepared_ones_have(archives):
    assert open_dataset("acdc", archives["acdc"], ANY).window is None  # the numbers of MR have no unit
    assert open_dataset("acdc", archives["acdc, SSL4MIS"], ANY).window == (0, 1)


def test_all_hundred_patients_are_the_official_number(tmp_path):
    root = write_acdc(tmp_path, range(1, 101), slices=1, size=(4, 4))
    data = open_dataset("acdc", root)
    assert {split: len(cases) for split, cases in data.splits.items()} == {"train": 140, "val": 20, "test": 40}


def test_the_challenges_test_patients_are_not_the_papers(archives, tmp_path):
    root = shutil.copytree(archives["acdc"], tmp_path / "database")
    shutil.copytree(root / "training" / "patient001", root / "testing" / "patient101")
    data = open_dataset("acdc", root, ANY)
    assert not any("patient101" in str(case.image) for case in all_cases(data))


def test_dataset_json_goes_before_the_name(tmp_path):
    write_pictures(tmp_path, 4)
    write_description(tmp_path, {"train": [{"image": "case0"}], "test": [{"image": "case1"}]}, LESION)
    data = open_dataset("busi", tmp_path)
    assert {split: names(cases) for split, cases in data.splits.items()} == {"train": ["case0"], "test": ["case1"]}


def test_a_folder_of_ones_own_is_read_as_before(tmp_path):
    data = open_dataset(None, write_pictures(tmp_path, 10))
    assert [len(cases) for cases in data.splits.values()] == [8, 2]
    assert data.how == {}
    assert "how" not in data.manifest()


def test_open_dataset_error_lists_the_known_data_sets(tmp_path):
    with pytest.raises(InputError, match=r"holds no known data set.*images/ with masks/.*busi: benign/.*acdc: "):
        open_dataset(None, tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(None, tmp_path / "absent")
    with pytest.raises(UsageError, match="no data set is called 'bus'; choose one of: folder, isic2017, busi"):
        open_dataset("bus", tmp_path)


def test_several_data_sets_in_one_folder_are_named(tmp_path):
    write_busi(tmp_path)
    write_clinicdb(tmp_path)
    with pytest.raises(InputError, match="several data sets, busi, clinicdb"):
        open_dataset(None, tmp_path, ANY)
    assert open_dataset("busi", tmp_path, ANY).how["dataset"] == "busi"


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("isic2017", DataOptions(count="any", split_seed=42), "ISIC 2017.* comes divided"),
        ("synapse", DataOptions(count="any", group_by="sequence"), "comes divided"),
        ("busi", DataOptions(count="any", group_by="patient"), "no patient is known of BUSI"),
        ("clinicdb", DataOptions(count="any", group_by="patient"), "no patient is known of CVC-ClinicDB"),
        ("clinicdb", DataOptions(count="any", masks="first"), "data.masks has no effect on CVC-ClinicDB"),
        ("acdc", DataOptions(count="any", organs="emcad"), "data.organs has no effect on ACDC"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(archives, layout, options, message):
    with pytest.raises(UsageError, match=message):
        open_dataset(None, archives[layout], options)


@pytest.mark.parametrize("change", ["split_seed=7", "masks=first", "group_by=sequence"])
def test_a_folder_of_ones_own_has_no_such_options(tmp_path, change):
    write_pictures(tmp_path, 4)
    options = with_changes(DataOptions(), (change,))
    with pytest.raises(UsageError, match=f"data.{change.partition('=')[0]} has no effect on .*dataset.json divides"):
        open_dataset(None, tmp_path, options)


def test_options_are_changed_by_name_and_read_back_from_a_recipe():
    changed = with_changes(DataOptions(), ("data.masks=first", "split_seed=7", "data.count=300"))
    assert (changed.masks, changed.split_seed, changed.count) == ("first", 7, 300)
    assert recorded_options(Provenance(recipe={"data": {"dataset": "busi", "masks": "first"}})).masks == "first"
    assert recorded_options(Provenance()) == DataOptions()
    for wrong in ("masks=third", "mask=first", "masks", "split_seed=-1", "count=0", "order=manifest"):
        with pytest.raises(UsageError, match="--set"):
            with_changes(DataOptions(), (wrong,))


def test_masks_are_found_in_every_layout(archives, tmp_path):
    assert all(is_labelled(root) for root in archives.values())
    assert not is_labelled(tmp_path)
    save_nifti(tmp_path / "scan.nii.gz", np.zeros((2, 3, 4), np.uint8), (1, 1, 1))
    assert not is_labelled(tmp_path)
