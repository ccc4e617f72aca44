"""Classify a DICOM object: an image, or another object that may hold pixels, such as a segmentation.

The SOP class decides. Where it is missing or private, the modality decides, and then attributes that only one type of
object has. Source: DICOM PS3.4 table B.5-1 (SOP classes) and PS3.3 section C.7.3.1.1.1 (modalities).
"""

from collections.abc import Mapping
from typing import Any

STANDARD = "1.2.840.10008."
STORAGE = STANDARD + "5.1.4.1.1."
IMAGE = None

SOP_CLASSES: Mapping[str, str | None] = {  # a class and those below it -> type of object, or IMAGE
    STANDARD + "1.3.10": "a DICOMDIR index",
    STANDARD + "5.1.4.34": "a radiotherapy delivery instruction",
    STANDARD + "5.1.4.38": "a hanging protocol",
    STANDARD + "5.1.4.39": "a color palette",
    STANDARD + "5.1.4.43": "an implant template",
    STANDARD + "5.1.4.44": "an implant template",
    STANDARD + "5.1.4.45": "an implant template",
    STORAGE + "4.2": "MR spectroscopy",
    STORAGE + "8": "an overlay",
    STORAGE + "9": "a waveform",
    STORAGE + "10": "a lookup table",
    STORAGE + "11": "a presentation state",
    STORAGE + "30": "a parametric map",
    STORAGE + "66": "raw data",
    STORAGE + "66.1": "a spatial registration",
    STORAGE + "66.2": "spatial fiducials",
    STORAGE + "66.3": "a deformable registration",
    STORAGE + "66.4": "a segmentation",
    STORAGE + "66.5": "a surface segmentation",
    STORAGE + "66.6": "tractography results",
    STORAGE + "66.7": "a label map segmentation",
    STORAGE + "66.8": "a height map segmentation",
    STORAGE + "67": "a real world value mapping",
    STORAGE + "68": "a surface scan",
    STORAGE + "77.1.5.3": "a stereometric relationship",
    STORAGE + "77.1.5.8": "an OCT volume analysis",
    STORAGE + "78": "ophthalmic measurements",
    STORAGE + "79": "a macular report",
    STORAGE + "80": "a visual field",
    STORAGE + "81": "an ophthalmic thickness map",
    STORAGE + "82": "a corneal topography map",
    STORAGE + "88": "a structured report",
    STORAGE + "88.59": "a key object selection",
    STORAGE + "90": "content assessment results",
    STORAGE + "91": "microscopy annotations",
    STORAGE + "104": "an encapsulated document",
    STORAGE + "129": "a PET curve",
    STORAGE + "131": "a structured display",
    STORAGE + "200": "a procedure protocol",
    STORAGE + "201": "an inventory",
    STORAGE + "481": "a radiotherapy record or instruction",
    STORAGE + "481.1": IMAGE,
    STORAGE + "481.2": "a radiotherapy dose",
    STORAGE + "481.3": "a radiotherapy structure set",
    STORAGE + "481.5": "a radiotherapy plan",
    STORAGE + "481.8": "a radiotherapy plan",
    STORAGE + "481.23": IMAGE,
    STORAGE + "481.24": IMAGE,
    STORAGE + "501.3": "a threat detection report",
}
MODALITIES: Mapping[str, str] = {
    **dict.fromkeys(("ANN", "ASMT"), "annotations"),
    **dict.fromkeys(("AU", "ECG", "EEG", "EMG", "EOG", "EPS", "HD", "RESP"), "a waveform"),
    **dict.fromkeys(("AR", "IOL", "KER", "LEN", "OAM", "OPV", "SRF", "VA"), "ophthalmic measurements"),
    **dict.fromkeys(("RTRECORD", "RTINTENT", "RTRAD", "RTSEGANN"), "a radiotherapy record or instruction"),
    "DOC": "an encapsulated document",
    "FID": "spatial fiducials",
    "KO": "a key object selection",
    "M3D": "a 3D model",
    "OPM": "an ophthalmic map",
    "PLAN": "a plan",
    "PR": "a presentation state",
    "REG": "a spatial registration",
    "RTDOSE": "a radiotherapy dose",
    "RTPLAN": "a radiotherapy plan",
    "RTSTRUCT": "a radiotherapy structure set",
    "RWV": "a real world value mapping",
    "SEG": "a segmentation",
    "SR": "a structured report",
}
ATTRIBUTES: Mapping[str, str] = {  # attribute -> the only type of object that has it
    "DoseGridScaling": "a radiotherapy dose",
    "SegmentSequence": "a segmentation",
    "StructureSetROISequence": "a radiotherapy structure set",
}


def kind_of_non_image(elements: Any) -> str | None:
    """Return the type of an object that is not an image, such as "a segmentation"; None for an image.

    Args:
        elements: pydicom's dataset, with its file meta information.
    """
    uid = sop_class(elements)
    parts = uid.split(".")
    for count in range(len(parts), 0, -1):
        known = ".".join(parts[:count])
        if known in SOP_CLASSES:
            return SOP_CLASSES[known]
    if uid.startswith(STANDARD):
        return IMAGE
    modality = str(elements.get("Modality") or "").strip().upper()
    attribute = next((name for name in ATTRIBUTES if name in elements), None)
    return MODALITIES.get(modality) or (ATTRIBUTES[attribute] if attribute else IMAGE)


def sop_class(elements: Any) -> str:
    """Return the SOP class from the object or its file meta information, or an empty string."""
    meta = elements.file_meta
    return str(elements.get("SOPClassUID") or (meta.get("MediaStorageSOPClassUID") if meta else None) or "").strip()
