"""DICOM folders as they come from scanners, viewers and anonymisers: all slices are used, and only images."""

import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicoms import (
    AXIAL,
    CORNER_MM,
    CORONAL,
    SAGITTAL,
    SERIES,
    corners,
    dataset,
    enhanced,
    numbers,
    placed,
    save,
    save_series,
    without_preamble,
)
from infer_folder import infer_to_folder
from itk import voxels_by_itk
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from tiny import picture

from medseg_trt.errors import InputError
from medseg_trt.imaging.dicom_signature import SIGNATURE_BYTES, starts_like_dicom
from medseg_trt.imaging.formats.dicom_objects import MODALITIES, SOP_CLASSES
from medseg_trt.imaging.images import find_images, read_image

STORAGE = "1.2.840.10008.5.1.4.1.1."
AFFINE = np.array([[-2.0, 0, 0, 31], [0, -1.5, 0, -12], [0, 0, 3, 7], [0, 0, 0, 1]])  # of ``save_slices``
STACK = np.stack([picture(index)[0] for index in range(6)]).astype(np.int16)


def save_slices(folder: Path, pixels: np.ndarray = STACK, **changing) -> Path:
    """Write axial slices; each keyword is a function from the slice's number to the value of that element."""
    for index, corner in enumerate(corners(len(pixels))):
        elements = {name: value(index) for name, value in changing.items()}
        save(folder / f"IM{index:04}", dataset(pixels[index], **(placed(corner=corner) | elements)))
    return folder


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- which slices make up a volume


def test_slices_that_share_one_uid_are_all_used_with_one_warning(tmp_path, caplog):
    image = read_image(save_slices(tmp_path / "scan", SOPInstanceUID=lambda _: "1.2.3"))
    np.testing.assert_array_equal(image.pixels[..., 0], STACK)
    (warning,) = warnings_of(caplog)
    assert "share a SOPInstanceUID (1 UIDs for 6 files)" in warning


@pytest.mark.parametrize("uid", ["same", "new", "none"])
def test_duplicate_dicom_slice_is_detected_by_position_and_pixels(uid, tmp_path, caplog):
    folder = save_slices(tmp_path / "scan")
    copy = folder / "IM0002 (1).dcm"
    if uid == "same":
        shutil.copy(folder / "IM0002", copy)
    elif uid == "new":
        save(copy, dataset(STACK[2], **placed(corner=corners(6)[2])))
    else:
        without_preamble(copy, dataset(STACK[2], **placed(corner=corners(6)[2]), SOPInstanceUID=None))
    image = read_image(folder)
    np.testing.assert_array_equal(image.pixels[..., 0], STACK)
    (warning,) = warnings_of(caplog)
    assert "left out as copies, with the same position and pixels: IM0002 (1).dcm of IM0002" in warning


def test_a_folder_that_holds_every_slice_twice_is_the_volume_with_one_warning(tmp_path, caplog):
    folder = save_slices(tmp_path / "scan")
    for path in sorted(folder.iterdir()):
        shutil.copy(path, folder / f"again {path.name}")
    np.testing.assert_array_equal(read_image(folder).pixels[..., 0], STACK)
    (warning,) = warnings_of(caplog)
    assert "(6 in all)" in warning


@pytest.mark.parametrize("uid", ["same", "new"])
def test_other_pixels_at_the_same_place_are_refused_with_both_names(uid, tmp_path):
    folder = save_slices(tmp_path / "scan", SOPInstanceUID=lambda index: f"1.2.{index + 1}")
    other = STACK[2].copy()
    other[0, 0] += 1
    described = dataset(other, **placed(corner=corners(6)[2]), SOPInstanceUID="1.2.3" if uid == "same" else "1.2.77")
    save(folder / "other", described)
    with pytest.raises(InputError, match="IM0002 and other lie at the same place with different pixels"):
        read_image(folder)


def test_a_series_for_every_slice_is_one_volume_with_a_warning(tmp_path, caplog):
    series = {"SeriesInstanceUID": lambda index: f"{SERIES}.{index + 1}", "SeriesNumber": lambda _: 2}
    folder = save_slices(tmp_path / "scan", **series)
    (source,) = find_images([folder])
    (warning,) = warnings_of(caplog)
    assert "6 slices with the same description have a SeriesInstanceUID each; they are evenly spaced" in warning
    assert source.stem == "scan"
    np.testing.assert_array_equal(read_image(source).pixels[..., 0], STACK)


@pytest.mark.parametrize(
    ("changing", "missing", "reason"),
    [
        ({}, (2,), "the distance between IM0001 and IM0003 is 6 mm, elsewhere 3 mm"),
        ({}, (0, 1, 2, 3), "two are too few to decide"),
        (
            {"StudyInstanceUID": lambda index: f"1.5.{index + 1}"},
            (),
            "6 evenly spaced slices have a StudyInstanceUID each",
        ),
        ({"SeriesDescription": lambda index: f"station {index}"}, (), None),
        ({"SeriesNumber": lambda index: index}, (), None),
    ],
)
def test_a_series_for_every_slice_that_may_be_no_volume_stays_images_of_their_own(
    changing, missing, reason, tmp_path, caplog
):
    series = {"SeriesInstanceUID": lambda index: f"{SERIES}.{index + 1}"}
    folder = save_slices(tmp_path / "scan", **(series | changing))
    for index in missing:
        (folder / f"IM{index:04}").unlink()
    assert len(find_images([folder])) == 6 - len(missing)
    warnings = warnings_of(caplog)
    assert len(warnings) == (reason is not None)
    assert all(reason in warning for warning in warnings)


@pytest.mark.parametrize("series_of", [lambda index: index % 2, lambda index: index // 3, lambda index: index == 4])
def test_a_volume_in_several_series_is_read_as_one_with_a_warning(series_of, tmp_path, caplog):
    folder = save_slices(tmp_path / "scan", SeriesInstanceUID=lambda index: f"{SERIES}.{int(series_of(index))}")
    (source,) = find_images([folder])
    (warning,) = warnings_of(caplog)
    assert "2 series with the same number and description are evenly spaced together" in warning
    np.testing.assert_array_equal(read_image(source).pixels[..., 0], STACK)


def test_two_series_at_the_same_places_stay_two_images(tmp_path, caplog):
    for name in "ab":
        save_slices(tmp_path / name, SeriesInstanceUID=lambda _, name=name: f"{SERIES}.{ord(name)}")
        for path in (tmp_path / name).iterdir():
            (tmp_path / "scan").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "scan" / f"{name}{path.name}")
    assert [len(source.files) for source in find_images([tmp_path / "scan"])] == [6, 6]
    assert not warnings_of(caplog)


def test_slices_of_one_series_that_differ_in_spacing_are_separate_images_with_a_warning(tmp_path, caplog):
    folder = save_slices(tmp_path / "scan", PixelSpacing=lambda index: [1.5 + 0.1 * (index // 3), 2.0])
    assert [len(source.files) for source in find_images([folder])] == [3, 3]
    (warning,) = warnings_of(caplog)
    assert "1 series differ in direction, pixel spacing or size and become 2 separate images" in warning


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_that_all_lack_a_part_of_their_position_are_separate_images_with_a_warning(name, tmp_path, caplog):
    folder = save_slices(tmp_path / "scan", STACK, **{name: lambda _: []})
    assert [len(source.files) for source in find_images([folder])] == [1] * 6
    (warning,) = warnings_of(caplog)
    assert f"6 slice(s) lack {name}" in warning


def test_the_files_of_a_concatenation_are_one_volume_and_a_missing_one_is_reported(tmp_path, caplog):
    for part in range(2):
        described = enhanced(STACK[3 * part :][:3], corners(6)[3 * part :][:3], [AXIAL] * 3)
        described.ConcatenationUID, described.InConcatenationTotalNumber = "1.7", 2
        save(tmp_path / "scan" / f"part{part}", described)
    (source,) = find_images([tmp_path / "scan"])
    np.testing.assert_array_equal(read_image(source).pixels[..., 0], STACK)
    assert not warnings_of(caplog)
    (tmp_path / "scan" / "part1").unlink()
    assert [len(source.files) for source in find_images([tmp_path / "scan"])] == [1]
    (warning,) = warnings_of(caplog)
    assert "1 of the 2 files that a volume is divided into are missing" in warning


def test_single_slices_of_two_studies_are_a_volume_each(tmp_path):
    for study in "12":
        values = {
            "SeriesInstanceUID": lambda index, study=study: f"{SERIES}.{study}.{index + 1}",
            "StudyInstanceUID": lambda _, study=study: f"1.5.{study}",
        }
        save_slices(tmp_path / study, STACK + np.int16(study), **values)
        for path in (tmp_path / study).iterdir():
            (tmp_path / "both").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "both" / f"{study}{path.name}")
    sources = find_images([tmp_path / "both"])
    assert [len(source.files) for source in sources] == [6, 6]
    assert sorted(int((read_image(source).pixels[..., 0] - STACK).max()) for source in sources) == [1, 2]


def test_a_slice_that_does_not_say_where_it_lies_is_an_image_of_its_own_with_a_warning(tmp_path, caplog):
    folder = save_slices(tmp_path / "scan")
    save(folder / "IM0006", dataset(STACK[5]))
    assert sorted(len(source.files) for source in find_images([folder])) == [1, 6]
    (warning,) = warnings_of(caplog)
    assert "IM0006 has no position in its series" in warning


# --- what is an image


def other_object(sop_class: str | None, modality: str, with_pixels: bool = True, **elements):
    pixels = None if with_pixels else {"PixelData": None, "Rows": None, "Columns": None}
    described = dataset(numbers() + 1, Modality=modality, **placed(), **elements, **(pixels or {}))
    described.SOPClassUID = UID(sop_class or "")
    return described


OBJECTS = {
    "seg.dcm": ("a segmentation", other_object(STORAGE + "66.4", "SEG")),
    "dose.dcm": ("a radiotherapy dose", other_object(STORAGE + "481.2", "RTDOSE", GridFrameOffsetVector=[0, 3, 6, 9])),
    "map.dcm": ("a parametric map", other_object(STORAGE + "30", "MR")),
    "thickness": ("an ophthalmic thickness map", other_object(STORAGE + "81.1", "OPM")),
    "struct.dcm": ("a radiotherapy structure set", other_object(STORAGE + "481.3", "RTSTRUCT", False)),
    "state": ("a presentation state", other_object(STORAGE + "11.1", "PR", False)),
    "report": ("a structured report", other_object(STORAGE + "88.22", "SR", False)),
    "key": ("a key object selection", other_object(STORAGE + "88.59", "KO", False)),
    "DICOMDIR": ("a DICOMDIR index", other_object("1.2.840.10008.1.3.10", "", False)),
    "private seg": ("a segmentation", other_object("1.2.3.4", "SEG")),
    "private dose": ("a radiotherapy dose", other_object("1.2.3.4", "", DoseGridScaling="0.01")),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_that_is_no_image_is_left_out_of_a_folder_by_its_name_and_refused_alone(name, tmp_path, caplog):
    kind, described = OBJECTS[name]
    folder = save_slices(tmp_path / "scan")
    path = save(folder / name, described)
    np.testing.assert_array_equal(read_image(folder).pixels[..., 0], STACK)
    (warning,) = warnings_of(caplog)
    assert warning == f"{folder}: left out, because they are not images: {name} ({kind})"
    with pytest.raises(InputError, match=rf"{name} is {kind}, not an image; give the image"):
        read_image(path)


def test_many_objects_are_left_out_in_one_line_with_their_number(tmp_path, caplog):
    folder = save_slices(tmp_path / "scan")
    for name in ("a", "b", "c"):
        save(folder / name, other_object(STORAGE + "11.1", "PR", False))
    save(folder / "d", other_object(STORAGE + "66.4", "SEG"))
    assert len(find_images([folder])) == 1
    (warning,) = warnings_of(caplog)
    assert warning.endswith("not images: a and 2 more (a presentation state), d (a segmentation)")


@pytest.mark.parametrize(
    ("sop_class", "modality"),
    [
        (STORAGE + "2", "CT"),
        (STORAGE + "4", "MR"),
        (STORAGE + "7", "SEG"),  # the class decides
        (STORAGE + "481.1", "RTIMAGE"),
        (STORAGE + "77.1.4", "XC"),
        ("1.2.3.4", "CT"),
        ("", ""),
        ("", "MR"),
    ],
)
def test_images_of_every_class_and_of_none_are_read(sop_class, modality, tmp_path, caplog):
    described = dataset(numbers()[0], Modality=modality, SliceThickness=3.0, **placed())
    described.SOPClassUID = UID(sop_class)
    path = without_preamble(tmp_path / "a.dcm", described) if not sop_class else save(tmp_path / "a.dcm", described)
    np.testing.assert_array_equal(read_image(path).pixels[0, ..., 0], numbers()[0])
    assert warnings_of(caplog) == []


def test_the_table_names_only_classes_of_the_standard_and_no_image(tmp_path):
    from pydicom._uid_dict import UID_dictionary

    known = {uid for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class"}
    newer = {STORAGE + "66.7", STORAGE + "66.8"}
    for uid in SOP_CLASSES.keys() - newer:
        below = {name for name in known if name == uid or name.startswith(f"{uid}.")}
        assert below, uid
    images = {uid for uid in known if "Image Storage" in UID_dictionary[uid][0]}
    assert len(images) > 60
    for uid in images:
        described = dataset(numbers()[0], Modality="SEG")
        described.SOPClassUID = UID(uid)
        assert read_image(save(tmp_path / "a.dcm", described)).num_slices == 1, uid
    assert {"SEG", "RTDOSE", "RTSTRUCT", "PR", "SR", "KO"} <= MODALITIES.keys()


# --- several images in one file


def test_an_enhanced_file_of_two_directions_is_refused_with_the_frames_and_what_to_do(tmp_path):
    directions = [AXIAL, AXIAL, CORONAL, AXIAL, CORONAL]
    places = [np.array(CORNER_MM) + step for step in ([0, 0, 0], [0, 0, 3], [0, 0, 0], [0, 0, 6], [0, 3, 0])]
    path = save(tmp_path / "planes.dcm", enhanced(np.zeros((5, 3, 5), np.int16), places, directions))
    with pytest.raises(InputError, match=r"planes\.dcm: frames 1,2,4 and frames 3,5 lie in different .*emf2sf --out-d"):
        read_image(path)


def test_an_enhanced_file_of_two_times_is_refused_with_the_frames_and_what_to_do(tmp_path):
    places = np.repeat(corners(3), 2, axis=0)
    path = save(tmp_path / "times.dcm", enhanced(numbers((6, 3, 5)), places, [AXIAL] * 6))
    with pytest.raises(InputError) as caught:
        read_image(path)
    line = str(caught.value)
    assert "frames 1 and 2 lie at the same place with different pixels (6 frames at 3 places)" in line
    assert "emf2sf --frame 1,3,5 --out-dir FOLDER times.dcm" in line
    assert line.count("times.dcm") == 2


def test_frames_saved_as_files_as_the_advice_says_are_an_image_a_direction(tmp_path):
    for index, orientation in enumerate([AXIAL, AXIAL, AXIAL, SAGITTAL, SAGITTAL]):
        corner = corners(3, orientation)[index % 3]
        save(tmp_path / "frames" / f"{index}.dcm", dataset(numbers()[0], **placed(orientation, corner)))
    assert [len(source.files) for source in find_images([tmp_path / "frames"])] == [3, 2]


def test_fewer_descriptions_than_frames_are_refused(tmp_path):
    described = enhanced(numbers(), corners(4), [AXIAL] * 4)
    described.PerFrameFunctionalGroupsSequence.pop()
    with pytest.raises(InputError, match=r"a\.dcm declares 4 frames, but describes 3"):
        read_image(save(tmp_path / "a.dcm", described))


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian]
)
def test_frames_that_the_header_does_not_count_are_never_left_out_in_silence(syntax, tmp_path):
    path = save(tmp_path / "a.dcm", dataset(numbers((3, 64, 64))), syntax)
    assert read_image(path).num_slices == 3
    content = path.read_bytes()
    if syntax == DeflatedExplicitVRLittleEndian:
        described = dataset(numbers((3, 64, 64)))
        described.NumberOfFrames = 2
        save(path, described, syntax)
    else:
        path.write_bytes(content.replace(b"\x28\x00\x08\x00IS\x02\x003 ", b"\x28\x00\x08\x00IS\x02\x002 "))
    with pytest.raises(InputError, match=r"a\.dcm holds 3 frames, but its header declares 2; correct NumberOfFrames"):
        read_image(path)


# --- without a preamble, and cut short


@pytest.mark.parametrize("encoding", ["implicit", "explicit", "big"])
def test_files_without_preamble_and_suffix_are_read(encoding, tmp_path):
    for index, corner in enumerate(corners(6)):
        described = dataset(STACK[index], **placed(corner=corner))
        without_preamble(tmp_path / "scan" / f"I{index:03}", described, encoding)
    (source,) = find_images([tmp_path])
    np.testing.assert_array_equal(read_image(source).pixels[..., 0], STACK)
    np.testing.assert_array_equal(read_image(tmp_path / "scan" / "I003").pixels[0, ..., 0], STACK[3])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0",
        b"plain text that is long enough to be looked at\n" * 9,
        bytes(200),
        b"\xff" * 200,
        b"\x08\0\x05\0" * 50,
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"\x5c\x01\0\0" + bytes(344),
        b"".join(b"\x08\0" + bytes([tag, 0]) + b"\x03\0\0\0abc" for tag in (5, 8, 16)) + bytes(20),
        b"".join(b"\x08\0" + bytes([tag, 0]) + b"\x02\0\0\0ab" for tag in (16, 8, 5)) + bytes(20),
        b"".join(b"\x10\0" + bytes([tag, 0]) + b"\x02\0\0\0ab" for tag in (5, 8, 16)) + bytes(20),
    ],
)
def test_other_content_does_not_look_like_dicom(content):
    assert not starts_like_dicom(content[:SIGNATURE_BYTES])


@pytest.mark.parametrize(  # compressed pixels end with an empty delimiter of 8 bytes
    ("syntax", "end"),
    [(ExplicitVRLittleEndian, 0), (RLELossless, 8), (JPEG2000Lossless, 8), (DeflatedExplicitVRLittleEndian, 1)],
)
def test_a_file_that_is_cut_anywhere_in_its_pixels_is_said_to_be_cut_short(syntax, end, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 999, (32, 32), dtype=np.int16)
    whole = save(tmp_path / "a.dcm", dataset(pixels, **placed()), syntax).read_bytes()
    path = tmp_path / "cut.dcm"
    for lost in (1, 2, 9, 100, 801):
        path.write_bytes(whole[: -lost - end])
        with pytest.raises(InputError, match=r"cut\.dcm cannot be read: it is cut short"):
            read_image(path)


def test_a_slice_that_is_cut_in_its_header_is_reported_and_the_rest_is_still_read(tmp_path, caplog):
    folder = save_slices(tmp_path / "scan")
    whole = (folder / "IM0005").read_bytes()
    refused = 0
    for length in range(140, whole.index(b"\x28\x00\x11\x00"), 10):
        (folder / "IM0005").write_bytes(whole[:length])
        caplog.clear()
        sources = find_images([folder])
        lone = [source for source in sources if not source.is_series]
        assert len(lone) == 1 or "IM0005 (an object without pixels)" in caplog.text  # cut between two elements
        for source in lone:
            refused += 1
            with pytest.raises(InputError, match=r"IM0005 (is cut short|cannot be read)"):
                read_image(source)
    assert refused > 20


def test_a_file_with_the_suffix_that_is_no_dicom_is_reported(tmp_path):
    folder = save_slices(tmp_path / "scan")
    (folder / "IM0006.dcm").write_bytes(bytes(4000))
    (lone,) = [source for source in find_images([folder]) if not source.is_series]
    with pytest.raises(InputError, match=r"IM0006\.dcm has no DICOM header"):
        read_image(lone)


# --- the same pixels in every form give the same mask


def variant_of(name: str, folder: Path) -> Path:
    if name == "shared UID":
        return save_slices(folder, SOPInstanceUID=lambda _: "1.2.3")
    if name == "series for every slice":
        return save_slices(folder, SeriesInstanceUID=lambda index: f"{SERIES}.{index + 1}")
    if name == "beside a segmentation":
        save(folder / "seg.dcm", OBJECTS["seg.dcm"][1])
        return save_slices(folder)
    if name == "with copies":
        save_slices(folder)
        shutil.copy(folder / "IM0001", folder / "IM0001 (1)")
        return folder
    if name == "without preamble":
        for index, corner in enumerate(corners(6)):
            without_preamble(folder / f"I{index}", dataset(STACK[index], **placed(corner=corner)))
        return folder
    if name == "enhanced":
        order = [3, 0, 5, 1, 4, 2]
        described = enhanced(STACK[order], corners(6)[order], [AXIAL] * 6)
        return save(folder / "scan.dcm", described)
    return save_series(folder, STACK)


VARIANTS = (
    "shared UID",
    "series for every slice",
    "beside a segmentation",
    "with copies",
    "without preamble",
    "enhanced",
    "plain",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_mask_is_voxel_for_voxel_that_of_the_same_pixels_as_nifti(name, tiny_bundle, tmp_path):
    (tmp_path / "plain").mkdir()
    nibabel.save(nibabel.Nifti1Image(STACK.transpose(2, 1, 0), AFFINE), tmp_path / "plain" / "scan.nii.gz")
    inputs = [tmp_path / "plain" / "scan.nii.gz", variant_of(name, tmp_path / "dicom")]
    masks = [
        infer_to_folder([path], tiny_bundle, tmp_path / f"masks{index}", on_error=_fail).masks
        for index, path in enumerate(inputs)
    ]
    (plain,), (stacked,) = masks
    (labels, places_mm), (others, other_places_mm) = voxels_by_itk(plain), voxels_by_itk(stacked)
    np.testing.assert_array_equal(others, labels)
    np.testing.assert_allclose(other_places_mm, places_mm, atol=1e-4)
    assert len(np.unique(labels)) > 1  # a mask of one label would hide a slice at the wrong place


def _fail(path, error) -> None:
    pytest.fail(f"{path}: {error}")
