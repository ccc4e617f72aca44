"""Images are found in folders in natural order, and output files are named after them."""

from pathlib import Path

import pytest

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import find_images, output_stem


def test_the_files_of_a_folder_come_in_natural_order_without_hidden_and_foreign_ones(tmp_path):
    names = ["img10.png", "img2.png", "IMG1.PNG", "scan.nii.gz", "b.nii", ".hidden.png", "notes.txt", "archive.gz"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "deeper.png").touch()
    assert [source.name for source in find_images([tmp_path])] == [
        "b.nii",
        "IMG1.PNG",
        "img2.png",
        "img10.png",
        "scan.nii.gz",
    ]


def test_the_order_of_the_inputs_is_kept_and_duplicates_come_once(tmp_path):
    paths = [tmp_path / name for name in ("b.png", "a.png", "c.png")]
    for path in paths:
        path.touch()
    assert [source.path for source in find_images(paths)] == paths
    sources = find_images([paths[2], tmp_path, paths[2]])
    assert [source.path for source in sources] == [paths[2], paths[1], paths[0]]


def test_numbers_and_letters_in_names_can_be_compared(tmp_path):
    names = ["1.png", "b.png", "a1b2.png", "a1b10.png", "a01b3.png", "10.png", "2.png"]
    for name in names:
        (tmp_path / name).touch()
    assert [source.name for source in find_images([tmp_path])] == [
        "1.png",
        "2.png",
        "10.png",
        "a1b2.png",
        "a01b3.png",
        "a1b10.png",
        "b.png",
    ]


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png does not exist"):
        find_images([tmp_path / "nowhere.png"])


def test_a_file_of_another_kind_is_refused_with_the_known_kinds(tmp_path):
    (tmp_path / "a.gif").touch()
    with pytest.raises(InputError, match=r"a\.gif is of an unsupported format; .*\.png, .*\.nii, \.nii\.gz"):
        find_images([tmp_path / "a.gif"])
    with pytest.raises(InputError, match=r"holds no image; supported files end with \.png"):
        find_images([tmp_path])


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.png", "a"), ("a.b.PNG", "a.b"), ("a.nii", "a"), ("a.v1.nii.gz", "a.v1"), ("A.NII.GZ", "A"), ("a.txt", "a")],
)
def test_the_stem_drops_one_kind_of_suffix(name, stem):
    assert output_stem(Path("folder.x", name)) == stem
