"""Write the mask of a DICOM image as a DICOM segmentation (binary segments, one per class).

Every frame refers to the source instance that it lies on. UIDs are derived from the source's UIDs and the bundle's
digest, and dates are the source's, so that the same input gives the same bytes on every run.
Source: DICOM PS3.3 A.51 and C.8.20.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from medseg_trt import __version__
from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.dicom import sorted_planes
from medseg_trt.imaging.formats.dicom_file import Plane
from medseg_trt.imaging.formats.dicom_stack import DEFAULT_THICKNESS_MM
from medseg_trt.imaging.formats.limits import convert_decoder_errors
from medseg_trt.imaging.formats.segment_codes import class_codes
from medseg_trt.imaging.images import DICOM, Mask, Source, kind_of
from medseg_trt.spec import Code

EXTRA = "serve"  # installs highdicom
REQUIRED_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
MAY_BE_EMPTY = (  # of the source (DICOM type 2): a segmentation repeats them, and a source may lack them
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)
DATES = (("ContentDate", "ContentTime"), ("AcquisitionDate", "AcquisitionTime"), ("SeriesDate", "SeriesTime"))
NO_DATE, NO_TIME = "19000101", "000000"  # of a source without any date; a segmentation must have one
SERIES_NUMBER_OFFSET = 9000  # beside the scanner's own series
MAX_DESCRIPTION = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeBy:
    """What made a mask, as its segmentation states it."""

    model: str  # the bundle's name
    digest: str  # SHA-256 of the bundle's manifest


def write_dicom_seg(mask: Mask, source: Source, made_by: MadeBy, path: Path) -> Path:
    """Write the segmentation of a DICOM file or series; it is read back and compared with the mask.

    Raises:
        InputError: the source is not DICOM, has no position in the patient, or lacks a UID that must be referred to.
        MissingExtraError: highdicom is not installed.
        MedsegError: the file read back differs from the mask; nothing is written.
    """
    segmentation, frames = _segmentation(mask, source, made_by)
    with atomic_file(path) as temporary:
        segmentation.save_as(temporary, enforce_file_format=True)
        if not np.array_equal(_read_back(temporary, frames.sources), frames.labels):
            raise MedsegError(f"the segmentation of {source.label} differs from its mask when read back")
    return path


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Frames:
    """The labels in the order of the source's planes."""

    labels: UInt8[ndarray, "frames rows columns"]
    sources: tuple[tuple[str, int | None], ...]  # SOP instance UID, and the frame's number in a multi-frame file


def _segmentation(mask: Mask, source: Source, made_by: MadeBy) -> tuple[Any, _Frames]:
    require("highdicom", EXTRA)
    from highdicom.seg import Segmentation

    planes = _planes(source)
    with convert_decoder_errors(source.path, Exception):
        datasets = _datasets(source, planes)
        first = datasets[0]
        labels = _stored_labels(mask)
        if len(labels) != len(planes) or labels.shape[1:] != (first.Rows, first.Columns):
            raise InputError(f"{source.label}: the mask is {labels.shape}, but the source has {len(planes)} planes")
        is_multi_frame = "PerFrameFunctionalGroupsSequence" in first
        if is_multi_frame:
            _share_geometry(first, planes[0])
            by_frame = np.zeros((len(first.PerFrameFunctionalGroupsSequence), *labels.shape[1:]), np.uint8)
            by_frame[[plane.frame for plane in planes]] = labels
            labels = by_frame
        instances = sorted(str(dataset.SOPInstanceUID) for dataset in datasets)
        date, time = _date_of(first)
        segmentation: Any = Segmentation(
            source_images=datasets,
            pixel_array=labels,
            segmentation_type="BINARY",
            segment_descriptions=_descriptions(mask, made_by),
            series_instance_uid=_derived_uid("series", instances, made_by),
            series_number=_series_number(first),
            sop_instance_uid=_derived_uid("instance", instances, made_by),
            instance_number=1,
            manufacturer="medseg-trt",
            manufacturer_model_name="medseg-trt",
            software_versions=__version__,
            device_serial_number=made_by.digest[:16],
            content_description=made_by.model[:MAX_DESCRIPTION],
            content_label="SEGMENTATION",
            series_description=f"Segmentation, {made_by.model}"[:MAX_DESCRIPTION],
            content_date=date,
            content_time=time,
        )
        segmentation.InstanceCreationDate, segmentation.InstanceCreationTime = date, time
        segmentation.SeriesDate, segmentation.SeriesTime = date, time
        segmentation.ContributingEquipmentSequence[-1].ContributionDateTime = (
            date + time
        )  # the source's, not the clock's
        _replace_dimension_uid(segmentation, _derived_uid("dimensions", instances, made_by))
    uids = [str(dataset.SOPInstanceUID) for dataset in datasets]
    numbered = (
        [(uids[0], frame + 1) for frame in range(len(labels))] if is_multi_frame else [(uid, None) for uid in uids]
    )
    return segmentation, _Frames(labels=labels, sources=tuple(numbered))


def _planes(source: Source) -> tuple[Plane, ...]:
    if not all(kind_of(path) == DICOM for path in source.files):
        raise InputError(
            f"{source.label} is not DICOM, so it has no DICOM segmentation; write its mask in another format"
        )
    planes = sorted_planes(source.path, source.files)
    if not planes:
        raise InputError(
            f"{source.label} gives no position in the patient, which a DICOM segmentation must state; "
            "write its mask in another format"
        )
    return planes


def _datasets(source: Source, planes: Sequence[Plane]) -> list[Any]:
    """Return the header of every source file, in the order of the planes.

    Raises:
        InputError: a UID is missing or not unique, or the files belong to several series.
    """
    pydicom = require("pydicom", "medical")
    datasets = [
        pydicom.dcmread(path, stop_before_pixels=True, force=True)
        for path in dict.fromkeys(plane.path for plane in planes)
    ]
    for dataset, path in zip(datasets, dict.fromkeys(plane.path for plane in planes), strict=True):
        for name in REQUIRED_UIDS:
            if not pydicom.uid.UID(str(dataset.get(name) or "")).is_valid:
                raise InputError(
                    f"{path} has no valid {name}, which a DICOM segmentation must refer to; export the series again"
                )
        for name in MAY_BE_EMPTY:
            if dataset.get(name) in (None, ""):
                setattr(dataset, name, None)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if len({str(dataset.get(name)) for dataset in datasets}) > 1:
            raise InputError(f"{source.label}: its slices have several values of {name}; export the series again")
    if len({str(dataset.SOPInstanceUID) for dataset in datasets}) < len(datasets):
        raise InputError(f"{source.label}: two slices have the same SOPInstanceUID; export the series again")
    return datasets


def _share_geometry(dataset: Any, plane: Plane) -> None:
    """State once what all frames of a volume have in common, where highdicom looks for it."""
    import highdicom

    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = (*plane.along_row, *plane.along_column)
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence("PATIENT", orientation)
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence(
        plane.spacing_mm, plane.thickness_mm or DEFAULT_THICKNESS_MM
    )


def _stored_labels(mask: Mask) -> UInt8[ndarray, "planes rows columns"]:
    """Return the labels in the order in which the source stores its planes, rows and columns."""
    orientations = require("nibabel.orientations", "medical")
    if mask.geometry is None:
        raise InputError(f"{mask.name} has no position in the patient, which a DICOM segmentation must state")
    ours = orientations.io_orientation(mask.geometry.affine_mm)
    axes = orientations.io_orientation(mask.geometry.header.get_best_affine())
    turn_back = orientations.ornt_transform(ours, axes)
    stored = orientations.apply_orientation(mask.labels.transpose(2, 1, 0), turn_back)
    return np.ascontiguousarray(stored.transpose(2, 1, 0))


def _descriptions(mask: Mask, made_by: MadeBy) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence(
        name="medseg-trt",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        parameters={"bundle_sha256": made_by.digest},
    )
    descriptions: list[Any] = []
    for number, code in enumerate(class_codes(mask.classes), 1):
        description = SegmentDescription(
            segment_number=number,
            segment_label=code.name[:MAX_DESCRIPTION],
            segmented_property_category=_concept(code.category),
            segmented_property_type=_concept(code.type),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=CIELabColor.from_rgb(*mask.classes.colors[number]),
        )
        if code.modifier is not None:
            kind = description.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(code.modifier)]
        descriptions.append(description)
    return descriptions


def _concept(code: Code) -> Any:
    from highdicom.sr.coding import CodedConcept

    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _date_of(dataset: Any) -> tuple[str, str]:
    """Return the source's date and time as DICOM writes them."""
    for date_name, time_name in (*DATES, ("StudyDate", "StudyTime")):
        if dataset.get(date_name):
            return str(dataset.get(date_name)), str(dataset.get(time_name) or NO_TIME)
    return NO_DATE, NO_TIME


def _series_number(dataset: Any) -> int:
    number = dataset.get("SeriesNumber")
    return SERIES_NUMBER_OFFSET + (max(int(number), 0) if number not in (None, "") else 0) % 1000


def _derived_uid(role: str, instances: Sequence[str], made_by: MadeBy) -> str:
    """Return a UID under 2.25, the root of UIDs made of 128 bits (DICOM PS3.5 B.2)."""
    text = "\n".join(("medseg-trt segmentation", role, made_by.digest, *instances))
    digest = bytearray(hashlib.sha256(text.encode()).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80  # version 8 of RFC 9562
    return f"2.25.{int.from_bytes(digest)}"


def _replace_dimension_uid(segmentation: Any, uid: str) -> None:
    """Replace the random UID that highdicom gives the dimensions of frames."""
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in segmentation[sequence].value:
            item.DimensionOrganizationUID = uid


def _read_back(path: Path, sources: Sequence[tuple[str, int | None]]) -> ndarray:
    """Read the labels of a segmentation for the given source instances or frames."""
    written: Any = require("highdicom.seg", EXTRA).segread(path)
    by_frame = sources[0][1] is not None
    if by_frame:
        frames = [frame for _, frame in sources]
        read = written.get_pixels_by_source_frame(
            sources[0][0],
            frames,
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
    else:
        read = written.get_pixels_by_source_instance(
            [uid for uid, _ in sources],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
    return np.asarray(read, np.uint8)
