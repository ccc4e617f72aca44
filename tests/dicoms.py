"""Generated DICOM files and series, none of a patient."""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SERIES = "1.2.826.0.1.3680043.8.498.1"
AXIAL, SAGITTAL, CORONAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)
OBLIQUE = tuple(np.linalg.qr(np.array([[0.9, 0.1, 0.3], [-0.2, 0.95, 0.1], [0.1, 0.2, 0.8]]))[0].T[:2].ravel())
SPACING_MM = (1.5, 2.0)  # rows, columns
CORNER_MM = (-31.0, 12.0, 7.0)
PATIENT = "Doe^Jane"


def numbers(shape=(4, 3, 5)) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def dataset(pixels: np.ndarray, **elements: Any) -> Dataset:
    """Return a CT slice (rows, columns) or (rows, columns, 3), or frames (frames, rows, columns)."""
    described = Dataset()
    described.SOPClassUID, described.SOPInstanceUID = CT, generate_uid()
    described.SeriesInstanceUID, described.Modality = SERIES, "CT"
    described.PatientName, described.PatientID = PATIENT, "4711"
    is_colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    described.Rows, described.Columns = pixels.shape[:2] if is_colour else pixels.shape[-2:]
    described.SamplesPerPixel = 3 if is_colour else 1
    described.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        described.PlanarConfiguration = 0
    described.BitsAllocated = described.BitsStored = 8 * pixels.dtype.itemsize
    described.HighBit = described.BitsStored - 1
    described.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3 and not is_colour:
        described.NumberOfFrames = len(pixels)
    described.PixelData = pixels.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(described, name)
        else:
            setattr(described, name, value)
    return described


def save(path: Path, described: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = described.SOPClassUID, described.SOPInstanceUID
    file = FileDataset(path, described, file_meta=meta, preamble=b"\0" * 128)
    if syntax in (RLELossless, JPEG2000Lossless):
        file.compress(syntax, generate_instance_uid=False)
    else:
        meta.TransferSyntaxUID = UID(syntax)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def placed(orientation=AXIAL, corner=CORNER_MM) -> dict[str, Any]:
    return {
        "ImageOrientationPatient": [round(float(value), 9) for value in orientation],
        "ImagePositionPatient": [round(float(value), 6) for value in corner],
        "PixelSpacing": list(SPACING_MM),
    }


def corners(count: int, orientation=AXIAL, step_mm: float = 3.0) -> np.ndarray:
    normal = np.cross(orientation[:3], orientation[3:])
    return np.array(CORNER_MM) + np.arange(count)[:, np.newaxis] * step_mm * normal


def save_series(folder: Path, pixels: np.ndarray, orientation=AXIAL, order=None, **elements: Any) -> Path:
    """Write slices (slices, rows, columns) under names and instance numbers that say nothing of their order."""
    shuffled = np.random.default_rng(5).permutation(len(pixels)) if order is None else order
    for name, index in enumerate(shuffled):
        where = placed(orientation, corners(len(pixels), orientation)[index])
        described = dataset(pixels[index], **(where | {"InstanceNumber": name + 1, "SliceThickness": 5.0} | elements))
        save(folder / f"IM{name:04}", described)
    return folder


def enhanced(pixels: np.ndarray, positions, orientations) -> Dataset:
    """Return an enhanced CT file of frames (frames, rows, columns), each with a place and an orientation."""
    described = dataset(pixels)
    described.SOPClassUID = ENHANCED_CT
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING_MM), 9.0
    shared.PixelMeasuresSequence = Sequence([measures])
    described.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for corner, orientation in zip(positions, orientations, strict=True):
        where, frame, position, direction = placed(orientation, corner), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = where["ImagePositionPatient"]
        direction.ImageOrientationPatient = where["ImageOrientationPatient"]
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = Sequence([position]), Sequence([direction])
        frames.append(frame)
    described.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return described


def without_preamble(path: Path, described: Dataset, encoding: str = "implicit") -> Path:
    """Write the data set alone, as before DICOM had files: "implicit", "explicit" or "big" (endian, explicit)."""
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = encoding != "big", encoding == "implicit"
    if encoding == "big":
        described.PixelData = np.frombuffer(described.PixelData, "<i2").astype(">i2").tobytes()
    described["PixelData"].VR = "OW"
    write_dataset(buffer, described)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path
