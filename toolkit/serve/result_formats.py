"""The forms of a result: the file that ``infer`` writes, a DICOM segmentation, and JSON with areas or outlines."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_seg import MadeBy, write_dicom_seg
from medseg_trt.imaging.images import DICOM as DICOM_KIND
from medseg_trt.imaging.images import SEGMENTATION_SUFFIX, Image, Mask, Source, kind_of, write_mask
from medseg_trt.imaging.preprocess import for_image
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.outlines import outlines
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.view import encode_view, read_view

PNG, TIFF, NIFTI, DICOM, JSON = (
    "image/png",
    "image/tiff",
    "application/x-nifti",
    "application/dicom",
    "application/json",
)
OUTLINES = "application/vnd.medseg.outlines+json"
VIEW = "application/vnd.medseg.view"  # of the page
SUFFIXES: Mapping[str, str] = {PNG: ".png", TIFF: ".tif", NIFTI: ".nii.gz", DICOM: SEGMENTATION_SUFFIX}
ALIASES: Mapping[str, str] = {
    "application/gzip": NIFTI,
    "application/vnd.nifti": NIFTI,
    "application/nifti": NIFTI,
    "application/octet-stream": "*/*",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptedRange:
    """A media range of an Accept header (RFC 9110, section 12.5.1)."""

    name: str
    quality: float  # 0: excluded
    position: int  # in the header

    @property
    def precision(self) -> int:
        """0 for all types, 1 for the subtypes of one, 2 for a single type: the most precise range decides."""
        return 0 if self.name == "*/*" else 1 if self.name.endswith("/*") else 2

    def matches(self, media_type: str) -> bool:
        """Return whether it covers a type."""
        return self.name in ("*/*", media_type) or (
            self.name.endswith("/*") and media_type.startswith(self.name.removesuffix("*"))
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segmentation:
    """A finished mask with what its forms are made of."""

    source: Source
    image: Image
    mask: Mask
    model: ServedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedResult:
    """A result as it is sent."""

    media_type: str
    content: bytes
    file_name: str


def native_type(mask: Mask) -> str:
    """Return the media type of the file that ``infer`` writes of a mask."""
    if mask.geometry is not None:
        return NIFTI
    return PNG if len(mask.labels) == 1 else TIFF


def preferred(header: str, available: Sequence[str]) -> str:
    """Return the media type that an Accept header prefers.

    Of equal ones it is the type that the header names first; a wildcard takes them in the order of ``available``.

    Raises:
        ProtocolError: the header is invalid (400), or excludes all of them (406).
    """
    ranges = accepted_ranges(header)
    ranked: list[tuple[float, int, int]] = []
    for index, media_type in enumerate(available):
        matching = [wanted for wanted in ranges if wanted.matches(media_type)]
        if matching and (best := max(matching, key=lambda wanted: (wanted.precision, wanted.quality))).quality:
            ranked.append((-best.quality, best.position, index))
    if not ranked:
        shown = ", ".join(media_type for media_type in available if media_type != VIEW)
        raise ProtocolError(f"none of the accepted media types exists for this image; available: {shown}", 406)
    return available[min(ranked)[2]]


def accepted_ranges(header: str) -> list[AcceptedRange]:
    """Return the media ranges of an Accept header; one of all types where it names none.

    Raises:
        ProtocolError: a quality is no number from 0 to 1 (400).
    """
    ranges: list[AcceptedRange] = []
    for part in header.split(","):
        name, *parameters = (word.strip().lower() for word in part.split(";"))
        if not name:
            continue
        values = {key: value for key, _, value in (word.partition("=") for word in parameters)}
        try:
            quality = float(values.get("q", "1"))
        except ValueError:
            quality = -1.0
        if not 0 <= quality <= 1:
            raise ProtocolError("the Accept header has a quality that is no number from 0 to 1")
        ranges.append(AcceptedRange(name=ALIASES.get(name, name), quality=quality, position=len(ranges)))
    return ranges or [AcceptedRange(name="*/*", quality=1.0, position=0)]


def forms_of(mask: Mask, source: Source) -> list[str]:
    """Return the media types that exist for a mask, the one of ``infer`` first."""
    return [native_type(mask), *((DICOM,) if _is_dicom(source) else ()), JSON, OUTLINES, VIEW]


def encode(media_type: str, result: Segmentation, folder: Path) -> EncodedResult:
    """Return a result in one form; files are written to ``folder`` and read back there.

    Raises:
        ProtocolError: the form does not exist for this image (406).
    """
    stem = result.mask.name.partition(".")[0] or "mask"
    if media_type in MAKERS:
        content = json.dumps(MAKERS[media_type](result), allow_nan=False, separators=(",", ":")).encode()
        return EncodedResult(media_type=media_type, content=content, file_name=f"{stem}.json")
    if media_type == VIEW:
        return EncodedResult(media_type=VIEW, content=_view(result), file_name=f"{stem}.view")
    if media_type == DICOM:
        path = folder / f"{stem}{SEGMENTATION_SUFFIX}"
        made_by = MadeBy(model=result.model.name, digest=result.model.digest)
        try:
            write_dicom_seg(result.mask, result.source, made_by, path)
        except InputError as error:
            raise ProtocolError(str(error), 406) from error
    elif media_type == native_type(result.mask):
        path = write_mask(result.mask, folder, durable=False)  # it is read back and not kept
    else:
        raise ProtocolError(f"{media_type} does not exist for this image", 406)
    return EncodedResult(media_type=media_type, content=path.read_bytes(), file_name=f"{stem}{SUFFIXES[media_type]}")


def _view(result: Segmentation) -> bytes:
    window = for_image(result.model.bundle.preprocessing, result.image.pixels).window
    header = summary(result) | {"is_dicom": _is_dicom(result.source)}
    return encode_view(header, result.image, result.mask, window)


def _is_dicom(source: Source) -> bool:
    return all(kind_of(path) == DICOM_KIND for path in source.files)


def summary(result: Segmentation) -> dict[str, Any]:
    """Return areas and volumes, and what a viewer needs to draw the mask."""
    image, classes = result.image, result.mask.classes
    areas = [
        {
            "label": label,
            "name": area.name,
            "color": list(classes.colors[label]),
            "pixels": area.pixels,
            "mm2": area.mm2,
            "ml": area.ml,
        }
        for label, area in enumerate(result.mask.areas(), 1)
    ]
    return {
        "model": result.model.name,
        "version": result.model.version,
        "shape": list(result.mask.labels.shape),
        "spacing_mm": None if image.spacing_mm is None else list(image.spacing_mm),
        "classes": areas,
        "unusual": result.mask.unusual,
        "outside_fraction": result.model.outside_fraction(image),
        "media_type": native_type(result.mask),
    }


def outlines_of(view: Path) -> bytes:
    """Return the outlines of a mask that was kept as a view."""
    header, labels = read_view(view)
    return json.dumps(header | {"outlines": outlines(labels)}, separators=(",", ":")).encode()


def _outlines(result: Segmentation) -> dict[str, Any]:
    return summary(result) | {"outlines": outlines(result.mask.labels)}


MAKERS: Mapping[str, Callable[[Segmentation], dict[str, Any]]] = {JSON: summary, OUTLINES: _outlines}
