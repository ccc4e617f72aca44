"""The rows of areas.csv name each mask of an archive once, and joined tables count as those of one run."""

from archive_runs import rows_of, save_slices, segment_tree, slices

from medseg_trt.archive import mask_tree
from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.request import ArchiveRequest, Part
from medseg_trt.bundles.bundle import load_bundle


def test_rows_of_images_that_are_named_by_dicom_name_their_masks_and_are_kept(tiny_bundle, tmp_path):
    """Single files of one name in two folders had the same row, which the next run dropped."""
    for number in (1, 2):
        path = tmp_path / "in" / f"s{number}" / "IM1"
        path.parent.mkdir(parents=True)
        uids = {"StudyInstanceUID": "9", "SeriesInstanceUID": f"1.2.{number}"}
        save_slices([path], slices(number, 1), PatientID="P", **uids)
    out, names = tmp_path / "out", ["P/9/1.2.1", "P/9/1.2.2"]
    segment_tree([tmp_path / "in" / "s1"], tiny_bundle, out, names="dicom")
    segment_tree([tmp_path / "in" / "s2"], tiny_bundle, out, names="dicom")
    assert [*dict.fromkeys(row["file"] for row in rows_of(out / "areas.csv"))] == names
    assert all(list(out.glob(f"{name}.*")) for name in names)


def test_joined_tables_count_unusual_images(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_tree, "unusual_reason", lambda _: "too bright")
    (tmp_path / "in").mkdir()
    for number in range(3):
        save_slices([tmp_path / "in" / f"{number}.dcm"], slices(number, 1), SeriesInstanceUID=f"1.{number}")
    out = tmp_path / "out"
    parts = [segment_tree([tmp_path / "in"], tiny_bundle, out, part=Part(number=number, of=2)) for number in (1, 2)]
    assert [part.num_unusual for part in parts] == [2, 1]
    joined = MaskTree(out, ArchiveRequest())
    joined.join([tmp_path / "in"], load_bundle(tiny_bundle))
    assert (joined.num_masks, joined.num_unusual) == (3, 3)
