"""Receive DICOM objects, by C-STORE and STOW-RS alike: checked, written to the spool, noted, and only then accepted."""

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.dicom_file import NotAnImageError, read_header
from medseg_trt.imaging.formats.limits import convert_decoder_errors
from medseg_trt.serve.jobs import DICOM_JOB, RESULT_FILES, RESULTS
from medseg_trt.serve.result_formats import DICOM
from medseg_trt.serve.spool import Instance, Spool, refused_when_full

LOG = logging.getLogger("medseg_trt.serve")
OBJECTS = "objects"
OUT_OF_RESOURCES, NO_MATCH, CANNOT_UNDERSTAND = 0xA700, 0xA900, 0xC000  # DICOM PS3.4 B.2.3


class RefusedError(MedsegError):
    """An object that is not accepted.

    Attributes:
        status: the status of the C-STORE response.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object that can be fetched: received, or made here."""

    uid: str
    study: str
    series: str
    sop_class: str
    path: Path


def accept(spool: Spool, content: bytes, expected: tuple[str, str] | None = None) -> Instance:
    """Take over a DICOM file; when this returns, it is on the disk and noted.

    The same object again is accepted once more and changes nothing.

    Args:
        spool: where to.
        content: a file with its meta information.
        expected: the SOP class and instance UID that the sender announced.

    Raises:
        RefusedError: it is no image, damaged, lacks a UID, or differs from an object with the same UID.
        FullError: the disk is full.
    """
    spool.require_space(len(content))
    digest = hashlib.sha256(content).hexdigest()
    folder = spool.folder / OBJECTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{digest}.dcm"  # one file a content: what is written twice is the same
    with refused_when_full(), atomic_file(path) as temporary:
        temporary.write_bytes(content)
        instance = _instance(temporary, digest, expected)
        if (known := spool.instance(instance.uid)) is not None:
            return _same(spool, known, instance, temporary)
    if not spool.add_instance(instance) and (known := spool.instance(instance.uid)) is not None:
        return _same(spool, known, instance, path)  # another association was faster
    return instance


def stored_objects(spool: Spool) -> list[StoredObject]:
    """Return the received objects and the segmentations that were made of them."""
    objects = [
        StoredObject(
            uid=instance.uid,
            study=instance.study,
            series=instance.series,
            sop_class=instance.sop_class,
            path=spool.folder / instance.file,
        )
        for instance in spool.instances()
    ]
    pydicom = require("pydicom", "medical")
    for job in spool.jobs():
        path = spool.job_folder(job.id) / RESULTS / RESULT_FILES[DICOM]
        if job.kind != DICOM_JOB or job.state != "done" or not path.is_file():
            continue
        made = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID", *UIDS])
        objects.append(
            StoredObject(
                uid=str(made.SOPInstanceUID),
                study=str(made.StudyInstanceUID),
                series=str(made.SeriesInstanceUID),
                sop_class=str(made.SOPClassUID),
                path=path,
            )
        )
    return objects


UIDS = ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID")


def _instance(path: Path, digest: str, expected: tuple[str, str] | None) -> Instance:
    uid_type: Any = require("pydicom.uid", "medical").UID
    try:
        header = read_header(path)
        with convert_decoder_errors(path, Exception):  # pydicom warns of invalid values and quotes them
            uids = {name: str(header.elements.get(name) or "") for name in ("SOPInstanceUID", *UIDS)}
            invalid = [name for name, uid in uids.items() if not uid_type(uid).is_valid]
    except NotAnImageError as error:
        raise RefusedError(f"the object is {error.kind}, not an image", NO_MATCH) from error
    except InputError as error:
        reason = str(error).removeprefix(str(path)).strip()
        raise RefusedError(f"the object cannot be used: it {reason}", CANNOT_UNDERSTAND) from error
    if invalid:
        raise RefusedError(f"the object has no valid {invalid[0]}", NO_MATCH)
    if expected is not None and expected != (uids["SOPClassUID"], uids["SOPInstanceUID"]):
        raise RefusedError("the object has other UIDs than were announced", NO_MATCH)
    return Instance(
        uid=uids["SOPInstanceUID"],
        study=uids["StudyInstanceUID"],
        series=uids["SeriesInstanceUID"],
        sop_class=uids["SOPClassUID"],
        sha256=digest,
        file=f"{OBJECTS}/{digest}.dcm",
        received=time.time(),
    )


def _same(spool: Spool, known: Instance, instance: Instance, path: Path) -> Instance:
    """Accept an object once more; the first one is kept.

    Senders write meta information and lengths in their own ways, so that the elements are compared; in another transfer
    syntax the pixels' bytes differ.
    """
    if known.sha256 == instance.sha256:
        return known
    first = spool.folder / known.file
    if read_header(first).syntax != read_header(path).syntax:
        LOG.warning("an object came again in another transfer syntax; the first one is kept")
    elif not _have_equal_elements(first, path):
        raise RefusedError("another object with the same SOP Instance UID was received before", CANNOT_UNDERSTAND)
    return known


def _have_equal_elements(first: Path, second: Path) -> bool:
    dcmread = require("pydicom", "medical").dcmread
    try:
        with convert_decoder_errors(second, Exception):
            return bool(dcmread(first) == dcmread(second))
    except InputError as error:
        reason = str(error).removeprefix(str(second)).strip()
        raise RefusedError(f"the object cannot be used: it {reason}", CANNOT_UNDERSTAND) from error
