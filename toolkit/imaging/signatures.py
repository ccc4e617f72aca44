"""Identify the format of a file by its first bytes: one table of supported formats and common unsupported ones.

The file name does not count: a PNG file called ``.jpg`` is a PNG file. The first bytes match the pattern of an entry.
Sources: ISO/IEC 15948 (PNG), ITU-T T.81 (JPEG), TIFF 6.0 and BigTIFF, nifti.nih.gov, teem.sourceforge.net/nrrd, DICOM
PS3.10 section 7.1, RFC 1952 (gzip), the HDF5 file format 3.0, APPNOTE.TXT (ZIP), RFC 9649 (WebP), itk.org (MetaImage).
"""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import InputError

HEAD_BYTES = 4096  # an HDF5 signature follows a user block of 512, 1024 or 2048 bytes
INFLATED_HEAD_BYTES = 348  # to the end of the NIfTI-1 mark; reading further could check the checksum of a small file
GZIP_WINDOW_BITS = 31  # zlib: a gzip stream
TO_PNG = "convert it to PNG, or to TIFF for several slices"
TO_NIFTI = "convert it to NIfTI or NRRD, for example with SimpleITK or 3D Slicer"
UNPACK = "unpack it and give the extracted files"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """A file format, recognised by a pattern of its first bytes."""

    name: str
    pattern: re.Pattern[bytes]
    suffix: str | None = None  # its key in ``images.READERS``; None where unsupported
    remedy: str = ""  # for an unsupported format: what to do with the file


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """The format of a file as its first bytes show it."""

    kind: FileKind
    gzipped: bool  # ``kind`` is the format inside a gzip stream

    @property
    def name(self) -> str:
        """The format in words."""
        return f"gzip-compressed {self.kind.name}" if self.gzipped else self.kind.name

    @property
    def suffix(self) -> str | None:
        """The key of its reader in ``images.READERS``; inside gzip only NIfTI is supported."""
        if self.gzipped:
            return ".nii.gz" if self.kind.suffix == NIFTI else None
        return self.kind.suffix

    @property
    def remedy(self) -> str:
        """What to do with a file of an unsupported format."""
        return self.kind.remedy or "unpack it with gunzip"


def _kind(name: str, pattern: bytes, suffix: str | None = None, remedy: str = "") -> FileKind:
    return FileKind(name=name, pattern=re.compile(pattern, re.DOTALL), suffix=suffix, remedy=remedy)


NIFTI = ".nii"
KINDS = (  # the first match counts; the preamble of a DICOM file may hold any other signature
    _kind("DICOM", rb".{128}DICM", ".dcm"),
    _kind("NIfTI", rb".{344}n\+1\0|.{4}n\+2\0", NIFTI),
    _kind("PNG", rb"\x89PNG\r\n\x1a\n", ".png"),
    _kind("JPEG", rb"\xff\xd8\xff", ".jpg"),
    _kind("TIFF", rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", ".tif"),
    _kind("NRRD", rb"NRRD\d", ".nrrd"),
    _kind("HDF5", rb"(?:.{512}|.{1024}|.{2048})?\x89HDF\r\n\x1a\n", ".h5"),
    _kind("ZIP or NumPy's npz", rb"PK(?:\x03\x04|\x05\x06)", ".npz"),
    _kind("WebP", rb"RIFF.{4}WEBP", remedy=TO_PNG),
    _kind("GIF", rb"GIF8[79]a", remedy=TO_PNG),
    _kind("JPEG 2000", rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51", remedy=TO_PNG),
    _kind("JPEG XL", rb"\0\0\0\x0cJXL \r\n|\xff\x0a", remedy=TO_PNG),
    _kind("HEIF or AVIF", rb".{4}ftyp(?:hei|hev|mif1|msf1|avi)", remedy=TO_PNG),
    _kind("Photoshop", rb"8BPS", remedy=TO_PNG),
    _kind("OpenEXR", rb"\x76\x2f\x31\x01", remedy=TO_PNG),
    _kind("Netpbm", rb"P[1-7]\s", remedy=TO_PNG),
    _kind("SVG", rb"\s*(?:<\?xml[^>]*>\s*)?<svg", remedy=TO_PNG),
    _kind("PDF", rb"%PDF-", remedy=TO_PNG),
    _kind("Zeiss CZI", rb"ZISRAWFILE", remedy=TO_PNG),
    _kind("MetaImage", rb"\s*(?:Comment\s*=[^\n]*\n\s*)*(?:ObjectType|NDims)\s*=", remedy=TO_NIFTI),
    _kind("NIfTI pair (.hdr and .img)", rb".{344}ni1\0|.{4}ni2\0", remedy="save it as one .nii file"),
    _kind("Analyze 7.5", rb"\x5c\x01\0\0|\0\0\x01\x5c", remedy=TO_NIFTI),
    _kind("MINC or NetCDF", rb"CDF[\x01\x02\x05]", remedy=TO_NIFTI),
    _kind("VTK", rb"# vtk DataFile", remedy=TO_NIFTI),
    _kind("MATLAB", rb"MATLAB 5\.0", remedy=TO_NIFTI),
    _kind("NumPy's npy", rb"\x93NUMPY", remedy="save it with numpy.savez as arrays 'image' and 'label', or as NIfTI"),
    _kind("bzip2", rb"BZh[1-9]", remedy=UNPACK),
    _kind("xz", rb"\xfd7zXZ\0", remedy=UNPACK),
    _kind("Zstandard", rb"\x28\xb5\x2f\xfd", remedy=UNPACK),
    _kind("7-Zip", rb"7z\xbc\xaf\x27\x1c", remedy=UNPACK),
    _kind("BMP", rb"BM.{8}....(?:[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)", ".bmp"),  # with the size of its header
)
SAME_KIND = {
    ".jpeg": ".jpg",
    ".tiff": ".tif",
    ".nhdr": ".nrrd",
    ".npy.h5": ".h5",
}  # suffixes of one format
GZIP = _kind("gzip", rb"\x1f\x8b\x08")


def identify(path: Path) -> Content | None:
    """Return the format of a file by its first bytes, or None where they match no entry of ``KINDS``.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    gzipped = GZIP.pattern.match(head) is not None
    if gzipped:
        try:
            head = zlib.decompressobj(GZIP_WINDOW_BITS).decompress(head, INFLATED_HEAD_BYTES)
        except zlib.error:
            head = b""
    kind = next((kind for kind in KINDS if kind.pattern.match(head)), None)
    return None if kind is None else Content(kind=kind, gzipped=gzipped)


def readable(path: Path) -> Content | None:
    """Return the format of a supported file, or None where its first bytes match no format.

    Raises:
        InputError: it cannot be opened, or is of a known but unsupported format, which the message names.
    """
    try:
        content = identify(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if content is not None and content.suffix is None:
        raise InputError(f"{path} is a {content.name} file, which is not supported; {content.remedy}")
    return content


def require_kind(path: Path, *suffixes: str) -> FileKind:
    """Return the format of a file, which must be one of the formats with these keys of ``images.READERS``.

    Raises:
        InputError: it is of another or of an unknown format.
    """
    content = readable(path)
    if content is None or content.kind.suffix not in suffixes:
        expected = " or ".join(kind.name for kind in KINDS if kind.suffix in suffixes)
        content_name = "of an unknown format" if content is None else f"a {content.name} file"
        raise InputError(
            f"{path} cannot be read: its first bytes are not those of a {expected} file: it is {content_name}; "
            "export it again"
        )
    return content.kind
