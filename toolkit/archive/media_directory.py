"""Read a DICOMDIR: the list of the files of a medium. Source: DICOM PS3.3 annex F."""

from collections.abc import Iterator
from pathlib import Path

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.formats.dicom_file import DEFLATED, MAX_HEADER_BYTES, Limited
from medseg_trt.imaging.formats.limits import convert_decoder_errors

NAME = "DICOMDIR"
MAX_RECORDS = 1 << 18  # pydicom takes 1.3 kB for one, even if it is empty
ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # how a record begins, in either order of bytes


def is_media_directory(path: Path) -> bool:
    """Return whether a file is a DICOMDIR, which the standard gives this name."""
    return path.name.upper() == NAME


def referenced_files(path: Path) -> Iterator[str]:
    """Yield the files that a DICOMDIR names, relative to its folder, with slashes.

    Raises:
        InputError: it is damaged or too large, or names no file.
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", "medical")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise InputError(f"{path} is larger than {MAX_HEADER_BYTES >> 20} MiB; give its folder with --tree instead")
    content = path.read_bytes()
    if max(map(content.count, ITEMS)) > MAX_RECORDS:
        raise InputError(f"{path} has more than {MAX_RECORDS} records; give its folder with --tree instead")
    with convert_decoder_errors(path, Exception), path.open("rb") as file:
        if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
            raise ValueError("it is deflated, which the standard does not allow")
        elements = pydicom.dcmread(
            Limited(file, MAX_HEADER_BYTES), specific_tags=["DirectoryRecordSequence", "ReferencedFileID"]
        )
        records = [record.get("ReferencedFileID") for record in elements.get("DirectoryRecordSequence") or ()]
    if not any(records):
        raise InputError(f"{path} names no file; give its folder with --tree, or rename it if it is an image")
    for parts in filter(None, records):
        yield "/".join([parts] if isinstance(parts, str) else map(str, parts))
