"""DICOM segmentations: read back by source instance and by position with other readers, and checked by dciodvfy."""

import json
import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicoms import AXIAL, CORONAL, OBLIQUE, SAGITTAL, corners, enhanced, save, save_series
from mask_positions import labels_at
from repaired_series import repair
from stored_bundle import stored_bundle

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_seg import MadeBy, write_dicom_seg
from medseg_trt.imaging.formats.segment_codes import OWN_SCHEME
from medseg_trt.imaging.images import Image, Mask, Source, read_image, write_mask
from medseg_trt.imaging.listing import list_images
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.spec import ClassCode, Classes, Code

LABELLED = {
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.9",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.8",
    "StudyDate": "20200102",
    "StudyTime": "030405",
}
ORGANS = Classes(names=("background", "liver", "kidney_right", "gizmo"))
MADE_BY = MadeBy(model="organs", digest="ab" * 32)


def series(folder: Path, orientation=AXIAL, shape=(5, 6, 7), **elements) -> tuple[Source, Image]:
    pixels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    save_series(folder, pixels, orientation, **(LABELLED | elements))
    (source,) = list_images([folder]).sources
    return source, read_image(source)


def random_mask(image: Image, classes: Classes = ORGANS) -> Mask:
    labels = np.random.default_rng(0).integers(0, len(classes.names), image.pixels.shape[:3]).astype(np.uint8)
    return Mask.of(image, labels, classes)


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, CORONAL, OBLIQUE])
def test_every_source_instance_has_the_labels_of_the_nifti_mask(orientation, tmp_path):
    source, image = series(tmp_path / "ct", orientation)
    mask = random_mask(image)
    nifti = write_mask(mask, tmp_path)
    written = highdicom.seg.segread(write_dicom_seg(mask, source, MADE_BY, tmp_path / "a.seg.dcm"))
    for file in source.files:
        dataset = pydicom.dcmread(file)
        (labels,) = written.get_pixels_by_source_instance(
            [dataset.SOPInstanceUID], combine_segments=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(labels, labels_at(nifti, dataset))


def test_the_frames_of_a_multi_frame_file(tmp_path):
    pixels = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5)
    order = [2, 0, 3, 1]
    described = enhanced(pixels, corners(4)[order], [AXIAL] * 4)
    for name, value in LABELLED.items():
        setattr(described, name, value)
    (source,) = list_images([save(tmp_path / "frames.dcm", described)]).sources
    mask = random_mask(read_image(source))
    written = highdicom.seg.segread(write_dicom_seg(mask, source, MADE_BY, tmp_path / "a.seg.dcm"))
    read = written.get_pixels_by_source_frame(
        described.SOPInstanceUID, [1, 2, 3, 4], combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(read, mask.labels[order])


def test_the_same_input_gives_the_same_bytes_and_another_bundle_other_uids(tmp_path):
    source, image = series(tmp_path / "ct")
    mask = random_mask(image)
    paths = [write_dicom_seg(mask, source, MADE_BY, tmp_path / name) for name in ("a.seg.dcm", "b.seg.dcm")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = pydicom.dcmread(
        write_dicom_seg(mask, source, MadeBy(model="organs", digest="cd" * 32), tmp_path / "c.seg.dcm")
    )
    first = pydicom.dcmread(paths[0])
    assert first.SOPInstanceUID != other.SOPInstanceUID
    assert first.SeriesInstanceUID != other.SeriesInstanceUID
    assert (first.ContentDate, first.InstanceCreationDate) == ("20200102", "20200102")


def test_codes_colours_and_the_bundle_are_stated(tmp_path):
    own = ClassCode(
        name="gizmo",
        category=Code(value="1", scheme="99HOSP", meaning="thing"),
        type=Code(value="2", scheme="99HOSP", meaning="gizmo"),
    )
    source, image = series(tmp_path / "ct")
    mask = random_mask(image, Classes(names=ORGANS.names, codes=(own,)))
    written = pydicom.dcmread(write_dicom_seg(mask, source, MADE_BY, tmp_path / "a.seg.dcm"))
    liver, kidney, gizmo = written.SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodingSchemeDesignator) == ("24028007", "SCT")
    assert gizmo.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99HOSP"
    colour = highdicom.color.CIELabColor.from_dicom_value(list(liver.RecommendedDisplayCIELabValue)).to_rgb()
    np.testing.assert_allclose(colour, ORGANS.colors[1], atol=1)  # 16-bit CIELab is rounded to 8-bit RGB
    assert MADE_BY.digest in str(liver.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters)


def test_a_class_without_a_code_is_warned_about(tmp_path, caplog):
    source, image = series(tmp_path / "ct")
    written = pydicom.dcmread(write_dicom_seg(random_mask(image), source, MADE_BY, tmp_path / "a.seg.dcm"))
    assert "no SNOMED CT code is known for gizmo" in caplog.text
    code = written.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodingSchemeDesignator, code.CodeMeaning) == (OWN_SCHEME, "gizmo")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"StudyInstanceUID": ""}, "no valid StudyInstanceUID"),
        ({"FrameOfReferenceUID": ""}, "no valid FrameOfReferenceUID"),
        ({"SOPInstanceUID": "1.2.3"}, "two slices have the same SOPInstanceUID"),
    ],
)
def test_a_source_that_cannot_be_referred_to_is_refused(changes, reason, tmp_path):
    source, image = series(tmp_path / "ct", **changes)
    with pytest.raises(InputError, match=reason):
        write_dicom_seg(random_mask(image), source, MADE_BY, tmp_path / "a.seg.dcm")
    assert not (tmp_path / "a.seg.dcm").exists()


def test_infer_writes_it_and_names_images_that_are_not_dicom(tmp_path):
    bundle = stored_bundle(tmp_path / "tiny.medseg")
    source, _ = series(tmp_path / "ct", shape=(3, 40, 36))
    auto, coded = MaskFolder(tmp_path / "auto"), MaskFolder(tmp_path / "coded", mask_format="dicom-seg")
    (mask,) = infer([tmp_path / "ct"], bundle, backend="onnxruntime", destination=auto)
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", destination=coded))
    assert [path.name for path in coded.masks] == ["ct.seg.dcm"]
    assert mask.labels.any(), "an empty mask would show nothing"
    written = highdicom.seg.segread(coded.masks[0])
    for file in source.files:
        dataset = pydicom.dcmread(file)
        (labels,) = written.get_pixels_by_source_instance(
            [dataset.SOPInstanceUID], combine_segments=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(labels, labels_at(auto.masks[0], dataset))
    kept = MaskFolder(tmp_path / "coded", mask_format="dicom-seg", resume=True)
    list(infer([tmp_path / "ct"], bundle, backend="onnxruntime", destination=kept))
    assert kept.kept == 1
    list(infer([auto.masks[0]], bundle, backend="onnxruntime", destination=kept))
    assert "is not DICOM" in kept.refused[0][1]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian package dicom3tools)")
def test_dciodvfy_finds_no_error_in_the_segmentation_of_a_real_series(organs, tmp_path):
    repair(organs / "dicom" / "ct_B", tmp_path / "ct")
    (source,) = list_images([tmp_path / "ct"]).sources
    names = tuple(json.loads((organs / "dataset.json").read_text())["classes"])
    image = read_image(source)
    labels = np.zeros(image.pixels.shape[:3], np.uint8)
    labels[5:15, 200:300, 100:180] = np.arange(80, dtype=np.uint8) // 10 + 1  # stripes of all organs
    path = write_dicom_seg(Mask.of(image, labels, Classes(names=names)), source, MADE_BY, tmp_path / "a.dcm")
    checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    lines = (checked.stdout + checked.stderr).splitlines()
    assert checked.returncode == 0
    assert [line for line in lines if line.startswith("Error")] == []
    assert "Segmentation" in lines
