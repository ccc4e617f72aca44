"""An uploaded file becomes one image: the formats that are accepted, and archives of a DICOM series.

The content decides, not a name or Content-Type. Nothing of an archive's names reaches the disk.
"""

import zipfile
import zlib
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import READERS, Image, Source, kind_of, read_image
from medseg_trt.imaging.listing import list_images
from medseg_trt.imaging.signatures import readable
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.settings import Limits
from medseg_trt.serve.spool import refused_when_full

UPLOAD = "image"  # the name of an uploaded file, and so the stem of its mask
SERIES = "series"
ZIP_MARK = b"PK\x03\x04"
CHUNK_BYTES = 1 << 20
REFUSED = (".npz", ".h5", ".npy.h5", ".nhdr")  # archives of arrays, and headers whose voxels lie elsewhere


def open_upload(path: Path, folder: Path, limits: Limits) -> Source:
    """Return the source that an uploaded file holds; an archive is unpacked into ``folder / SERIES``.

    Raises:
        ProtocolError: an archive is too large or damaged, or the format is not accepted.
        FullError: the disk is full.
        InputError: it holds no image, or several.
    """
    if not path.stat().st_size:
        raise ProtocolError("the body is empty; send the bytes of one image")
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MARK)) == ZIP_MARK
    if is_zip:
        return _series(path, folder / SERIES, limits)
    content = readable(path)
    suffix = content.suffix if content is not None else None
    if suffix in REFUSED or (suffix not in READERS and (suffix is not None or kind_of(path) is None)):
        raise ProtocolError(
            "the format is not accepted; send PNG, JPEG, TIFF, NIfTI, NRRD, DICOM or a zip of DICOM", 415
        )
    return Source(path=path, files=(path,), stem=path.name)


def read_upload(source: Source, limits: Limits) -> Image:
    """Read the image of an upload.

    Raises:
        InputError: it is damaged, or larger than ``max_pixels``.
    """
    image = read_image(source)
    if image.pixels[..., 0].size > limits.max_pixels:
        raise ProtocolError(f"the image has {image.pixels[..., 0].size} pixels; {limits.max_pixels} are possible", 413)
    return image


def public_message(error: Exception, folder: Path) -> str:
    """Return an error's line without the paths of the server."""
    text = str(error)
    for path, name in ((folder / SERIES, "the series"), (folder / UPLOAD, "the file"), (folder, "the upload")):
        text = text.replace(str(path), name)
    return " ".join(text.split())


def _series(path: Path, folder: Path, limits: Limits) -> Source:
    try:
        with refused_when_full():
            _unpack(path, folder, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, RuntimeError) as error:
        raise ProtocolError("the zip archive is damaged, encrypted, or compressed in an unknown way") from error
    listing = list_images([folder])
    if listing.refused:
        raise listing.refused[0].error
    if len(listing.sources) != 1:
        raise InputError(f"the zip archive holds {len(listing.sources)} images; send one series")
    return listing.sources[0]


def _unpack(path: Path, folder: Path, limits: Limits) -> None:
    folder.mkdir()
    left = limits.max_body_bytes
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > limits.max_zip_members:
            raise ProtocolError(f"the zip has {len(entries)} files; {limits.max_zip_members} are possible", 413)
        for index, entry in enumerate(entries):
            with archive.open(entry) as member, (folder / f"{index:05}.dcm").open("wb") as file:
                while chunk := member.read(CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        raise ProtocolError(f"the zip unpacks to more than {limits.max_body_bytes} bytes", 413)
                    file.write(chunk)
