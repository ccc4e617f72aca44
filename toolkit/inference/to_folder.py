"""Write the results of ``infer`` into a folder: masks, overlays and a table of areas."""

import errno
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, MedsegError, MissingExtraError
from medseg_trt.files import sha256
from medseg_trt.imaging.formats.nrrd import voxel_files
from medseg_trt.imaging.formats.slide import Slide, find_slide
from medseg_trt.imaging.images import (
    MASK_SUFFIXES,
    SEGMENTATION_SUFFIX,
    Image,
    Mask,
    Source,
    kind_of,
    output_stem,
    read_image,
    write_mask,
)
from medseg_trt.imaging.listing import LeftOut, list_images
from medseg_trt.imaging.overlay import write_overlay
from medseg_trt.imaging.preprocess import for_image
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.areas_table import AREAS, AreaTable, area_rows, unusual_reason
from medseg_trt.inference.destination import Destination
from medseg_trt.inference.outcomes import Kept, Refused, SlideToSegment
from medseg_trt.inference.output_folder import name_limit, require_outside, require_safe
from medseg_trt.inference.record_seal import record_key
from medseg_trt.inference.resume import Record, load_record, overlay_path, remove_leftovers, save_record
from medseg_trt.progress import LOG, plural
from medseg_trt.sessions.base import Session
from medseg_trt.tiling.segment import with_mpp

if TYPE_CHECKING:
    from medseg_trt.imaging.formats.dicom_seg import MadeBy

MaskFormat = Literal["auto", "dicom-seg"]
TIFF = ".tif"
# Errors of one file name; other errors of a disk concern all files.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


class MaskFolder(Destination):
    """Write a mask for every image, ``areas.csv`` and, on request, ``overlays/``; an unusable file stops only itself.

    Ignored files are logged as warnings. Rows of ``areas.csv`` whose masks an earlier run wrote are kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        overlay: bool = False,
        resume: bool = False,
        mask_format: MaskFormat = "auto",
        on_error: Callable[[Path, InputError], None] | None = None,
    ) -> None:
        """Choose the folder and what is written into it; nothing is written before the run.

        Args:
            folder: the output folder; it need not exist.
            overlay: also draw the masks over the images.
            mask_format: ``auto`` is the format that suits the image, see ``write_mask``; ``dicom-seg`` a DICOM
                segmentation, of DICOM images alone.
            resume: skip an image if an earlier run has finished it with the same bundle and options.
            on_error: called for every input that cannot be used; None logs a warning.
        """
        self.folder = folder
        self.overlay = overlay
        self.resume = resume
        self.mask_format: MaskFormat = mask_format
        self.masks: list[Path] = []
        self.num_sources = 0  # images in the inputs
        self.num_masks = 0  # also those of an earlier run
        self.num_left_out = 0  # files that are not images
        self.kept = 0  # masks of an earlier run, among ``masks``
        self.refused: list[tuple[str, str]] = []  # every input that could not be used, and the reason
        self.left_out: tuple[LeftOut, ...] = ()  # files in the input folders that are not images
        self.num_unusual = 0  # images unlike the training images
        self.unusual: dict[str, str] = {}  # their names and the reasons
        self._table: AreaTable | None = None  # of the run, between its beginning and its end
        self._keys: dict[Source, str] = {}  # of the images between reading and writing
        self._made_by = ""  # what the masks of a run depend on, besides their images
        self._on_error = on_error or _warn

    @cached_property
    def _seal_key(self) -> bytes:
        return record_key()

    @property
    def areas(self) -> Path:
        """The path of the table of areas."""
        return self.folder / AREAS

    @property
    def tables_text(self) -> str:
        """Where the tables are, in words."""
        return f"areas in {self.areas}"

    def summary(self) -> dict[str, Any]:
        """Return the result of a run, for JSON."""
        return {
            "masks": [str(path) for path in self.masks],
            "areas": str(self.areas),
            "kept": self.kept,
            "failed": dict(self.refused),
            "unusual": self.unusual,
            "skipped": [
                {"path": str(left_out.path), "reason": left_out.reason, "files": left_out.count}
                for left_out in self.left_out
            ],
        }

    def find_sources(self, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        """Find the images; note inputs that cannot be used.

        Raises:
            InputError: there is one input and it cannot be used, or there is no image at all.
            UsageError: two masks would have the same name, one would overwrite an input or a link, or the output folder
                is in the bundle.
        """
        require_outside(self.folder, bundle.folder)
        listing = list_images(inputs, ignored=[self.folder, bundle.folder])
        if not listing.sources and len(listing.refused) == 1:
            raise listing.refused[0].error
        require_safe(self.folder, listing.sources)
        for line in listing.warnings():
            LOG.warning("%s", line)
        self.left_out = listing.left_out
        self.num_left_out = sum(item.count for item in listing.left_out)
        self.num_sources = len(listing.sources)
        for refused in listing.refused:
            self.note_refused(refused.path, str(refused.path), refused.error)
        if not listing.sources:
            raise InputError(f"none of {len(self.refused)} inputs can be used; they are named above")
        return listing.sources

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Make the folder, and write ``areas.csv`` at the end, also after an interrupt."""
        if self.resume:
            remove_leftovers(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(AreaTable()) as self._table:
            try:
                yield
            finally:
                self._table.write(self.folder)
        if self.kept:
            LOG.info("%s of an earlier run %s kept", plural(self.kept, "mask"), "was" if self.kept == 1 else "were")

    def read(
        self, sources: Sequence[Source], bundle: Bundle, session: Session, batch: int
    ) -> Iterator[Image | SlideToSegment | Kept | Refused]:
        """Yield every image, its record if an earlier run finished it, or the reason why it cannot be used."""
        self._made_by = f"bundle {bundle.mask_key}, {session.description}, batch {batch}, overlay {self.overlay}" + (
            "" if self.mask_format == "auto" else f", format {self.mask_format}"
        )
        max_name_bytes = name_limit(self.folder)
        for source in sources:
            try:
                _require_short_name(source, max_name_bytes)
                with self.local_files(source) as local:
                    self._keys[source] = key = f"image {_digest(local)}, {self._made_by}"
                    record = self._earlier_record(source, key) if self.resume else None
                    item = self._read(source, local, bundle) if record is None else Kept(record)
                yield item
            except (InputError, MissingExtraError) as error:
                yield Refused(error)
            except MedsegError:
                raise
            except Exception as error:
                yield Refused(error)

    @contextmanager
    def local_files(self, source: Source) -> Generator[Source, None, None]:
        """Yield the same image in files that can be opened by their paths."""
        yield source

    def read_local(self, source: Source, local: Source) -> Image:
        """Read an image from the files that ``local_files`` yields."""
        return read_image(local)

    def _read(self, source: Source, local: Source, bundle: Bundle) -> Image | SlideToSegment:
        """Read an image, or find the large one that is segmented window by window as it is read."""
        tiles = bundle.tiles
        is_copy = local.files != source.files  # of a file in an archive; it is deleted before it could be segmented
        if tiles is not None and not is_copy and not source.is_series and kind_of(source.path) == TIFF:
            slide = find_slide(source.path, tiles.mpp, bundle.preprocessing.spacing_mm)
            if slide is not None:
                return self._slide(source, slide)
        return with_mpp(self.read_local(source, local), tiles)

    def _slide(self, source: Source, slide: Slide) -> SlideToSegment:
        if self.overlay or self.mask_format != "auto":
            raise InputError(f"{source.label} is read by rows, without overlay; leave out --overlay and --format")
        stem = None if output_stem(source.path) == source.stem else source.stem
        return SlideToSegment(replace(slide, stem=stem), self.slide_mask_path(source))

    def slide_mask_path(self, source: Source) -> Path:
        """Return the file that the mask of a slide is written to."""
        return self.folder / f"{source.stem}{TIFF}"

    def name_of(self, source: Source, mask: Mask | SlideMask) -> str:
        """Return the name of an image in the table of areas."""
        return mask.name

    def write(self, source: Source, image: Image, mask: Mask, bundle: Bundle) -> bool:
        """Write the files of one image, the mask last, and then its record; return False if the image is refused."""
        try:
            record = self._write_files(source, image, mask, bundle)
        except InputError as error:
            self.refuse(source, error)
            return False
        self._note_mask(source, record)
        return True

    def write_slide(self, source: Source, mask: SlideMask) -> None:
        """Note the mask of a slide, and write its record."""
        record = self._record(source, mask, mask.file, None)
        self._finish_files(source, record)
        self._note_mask(source, record)

    def keep(self, source: Source, record: Record) -> None:
        """Count the mask of an earlier run."""
        self.kept += 1
        self._keys.pop(source, None)
        self._note_mask(source, record)

    def refuse(self, source: Source, error: Exception) -> None:
        """Report an image that cannot be used, in one line."""
        self._keys.pop(source, None)
        self.note_refused(source.path, source.label, _as_input_error(source, error))

    def note_refused(self, path: Path, label: str, error: InputError) -> None:
        """Report an input that cannot be used, and count it."""
        self.refused.append((label, str(error)))
        self._on_error(path, error)

    def _note_mask(self, source: Source, record: Record) -> None:
        assert self._table is not None
        self.num_masks += 1
        self.masks.append(self.folder / f"{source.stem}{record.mask_suffix}")
        self._table.add(f"{source.stem}{record.mask_suffix}", record.areas)
        if (reason := unusual_reason(record.areas)) is not None:
            self.num_unusual += 1
            self.unusual[source.label] = reason

    def _write_files(self, source: Source, image: Image, mask: Mask, bundle: Bundle) -> Record:
        """Write overlay, mask and record.

        Raises:
            InputError: an error that concerns this image alone.
        """
        try:
            overlay_sha256 = None
            if self.overlay:
                path = overlay_path(self.folder, source.stem)
                write_overlay(image, mask, for_image(bundle.preprocessing, image.pixels).window, path)
                overlay_sha256 = sha256(path)
            path = self._write_mask(mask, source, bundle)
            record = self._record(source, mask, path, overlay_sha256)
            self._finish_files(source, record)
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise
            raise InputError(
                f"{source.label}: its mask cannot be written: {error.strerror}; rename the image"
            ) from error
        except MedsegError:
            raise
        except Exception as error:
            raise _as_input_error(source, error) from error
        return record

    def _earlier_record(self, source: Source, key: str | None) -> Record | None:
        """Return the record of an earlier run whose files are still there; ``key`` as for ``load_record``."""
        return load_record(self.folder, source.stem, key, self._seal_key)

    def _finish_files(self, source: Source, record: Record) -> None:
        """Write the record of an image whose other files are complete."""
        save_record(self.folder, source.stem, record, self._seal_key)

    def _record(self, source: Source, mask: Mask | SlideMask, path: Path, overlay_sha256: str | None) -> Record:
        stem_name = source.stem.rpartition("/")[2]
        return Record(
            key=self._keys.pop(source),
            mask_suffix=next(suffix for suffix in MASK_SUFFIXES if path.name == f"{stem_name}{suffix}"),
            mask_sha256=sha256(path),
            overlay_sha256=overlay_sha256,
            areas=area_rows(mask, self.name_of(source, mask)),
        )

    def _write_mask(self, mask: Mask, source: Source, bundle: Bundle) -> Path:
        if self.mask_format == "auto":
            return write_mask(mask, self.folder)
        from medseg_trt.imaging.formats.dicom_seg import write_dicom_seg

        path = self.folder / f"{source.stem}{SEGMENTATION_SUFFIX}"
        with self.local_files(source) as local:
            return write_dicom_seg(mask, local, made_by(bundle), path)


def made_by(bundle: Bundle) -> "MadeBy":
    """Return what a DICOM segmentation states of the bundle that made it."""
    from medseg_trt.imaging.formats.dicom_seg import MadeBy

    return MadeBy(model=bundle.folder.resolve().name.removesuffix(".medseg"), digest=bundle.manifest_sha256)


def _as_input_error(source: Source, error: Exception) -> InputError:
    """Return an error of one image as one line for the user."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, MedsegError):
        return InputError(str(error))
    if isinstance(error, MemoryError):
        return InputError(
            f"{source.label} needs more memory than is free; use a smaller --batch, or crop or resample it"
        )
    LOG.debug("%s", source.label, exc_info=error)
    return InputError(f"{source.label} cannot be segmented: {type(error).__name__}: {error}")


def _require_short_name(source: Source, max_name_bytes: int) -> None:
    count = max(len(os.fsencode(part)) for part in f"{source.stem}{MASK_SUFFIXES[0]}".split("/"))
    if count > max_name_bytes:
        raise InputError(
            f"{source.label}: the name of its mask would have {count} bytes, "
            f"and {max_name_bytes} are possible; rename it"
        )


def _digest(source: Source) -> str:
    try:
        return sha256(*source.files, *([] if source.is_series else voxel_files(source.files[0])))
    except OSError as error:
        raise InputError(f"{source.path} cannot be read: {error.strerror}") from error


def _warn(_path: Path, error: InputError) -> None:
    LOG.warning("%s", error)
