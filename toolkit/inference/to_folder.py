"""Write the results of ``infer`` into a folder: masks, overlays and a table of areas."""

import errno
import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medseg_trt.bundles.bundle import MANIFEST, Bundle
from medseg_trt.errors import InputError, MedsegError, MissingExtraError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import MASK_SUFFIXES, Image, Mask, Source, read_image, write_mask
from medseg_trt.imaging.listing import LeftOut, list_images
from medseg_trt.imaging.overlay import write_overlay
from medseg_trt.imaging.preprocess import for_image
from medseg_trt.inference.areas_table import AREAS, Row, area_rows, merge_areas
from medseg_trt.inference.destination import Destination
from medseg_trt.inference.outcomes import Refused, Skipped
from medseg_trt.inference.output_folder import name_limit, require_safe
from medseg_trt.inference.resume import Record, load_record, overlay_path, remove_leftovers, save_record
from medseg_trt.progress import LOG
from medseg_trt.sessions.base import Session

# Errors of one file name; other errors of a disk concern all files.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR)


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
        on_error: Callable[[Path, InputError], None] | None = None,
    ) -> None:
        """Choose the folder and what is written into it; nothing is written before the run.

        Args:
            folder: the output folder; it need not exist.
            overlay: also draw the masks over the images.
            resume: skip an image if an earlier run has finished it with the same bundle and options.
            on_error: called for every input that cannot be used; None logs a warning.
        """
        self.folder = folder
        self.overlay = overlay
        self.resume = resume
        self.masks: list[Path] = []
        self.kept = 0  # masks of an earlier run, among ``masks``
        self.refused: list[tuple[str, str]] = []  # every input that could not be used, and the reason
        self.left_out: tuple[LeftOut, ...] = ()  # files in the input folders that are not images
        self._rows: list[Row] = []
        self._keys: dict[Source, str] = {}
        self._on_error = on_error or _log_error

    @property
    def areas(self) -> Path:
        """The path of the table of areas."""
        return self.folder / AREAS

    def find_sources(self, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        """Find the images; note inputs that cannot be used.

        Raises:
            InputError: there is one input and it cannot be used, or there is no image at all.
            UsageError: two masks would have the same name, or one would overwrite an input or a link.
        """
        listing = list_images(inputs, ignored=[self.folder, bundle.folder])
        if not listing.sources and len(listing.refused) == 1:
            raise listing.refused[0].error
        require_safe(self.folder, listing.sources)
        for line in listing.warnings():
            LOG.warning("%s", line)
        self.left_out = listing.left_out
        for refused in listing.refused:
            self._note_refused(refused.path, str(refused.path), refused.error)
        if not listing.sources:
            raise InputError(f"none of {len(self.refused)} inputs can be used; they are named above")
        return listing.sources

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Make the folder, and write ``areas.csv`` at the end, also after an interrupt."""
        if self.resume:
            remove_leftovers(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            merge_areas(self.folder, [path.name for path in self.masks], self._rows)
        if self.kept:
            LOG.info("%d mask(s) of an earlier run were kept", self.kept)

    def read(
        self, sources: Sequence[Source], bundle: Bundle, session: Session, batch: int
    ) -> Iterator[Image | Skipped | Refused]:
        """Yield every image, its record if an earlier run finished it, or the reason why it cannot be used."""
        made_by = (
            f"bundle {sha256(bundle.folder / MANIFEST)}, {session.description}, batch {batch}, overlay {self.overlay}"
        )
        max_name_bytes = name_limit(self.folder)
        for source in sources:
            try:
                _require_short_name(source, max_name_bytes)
                self._keys[source] = key = f"image {_digest(source)}, {made_by}"
                record = load_record(self.folder, source.stem, key) if self.resume else None
                yield read_image(source) if record is None else Skipped(record)
            except (InputError, MissingExtraError) as error:
                yield Refused(error)
            except MedsegError:
                raise
            except Exception as error:
                yield Refused(error)

    def write(self, source: Source, image: Image, mask: Mask, bundle: Bundle) -> bool:
        """Write the files of one image, the mask last, and then its record; return False if the image is refused."""
        try:
            record = self._write_files(source, image, mask, bundle)
        except InputError as error:
            self.refuse(source, error)
            return False
        self._note_mask(source, record)
        return True

    def keep(self, source: Source, record: Record) -> None:
        """Count the mask of an earlier run."""
        self.kept += 1
        self._note_mask(source, record)

    def refuse(self, source: Source, error: Exception) -> None:
        """Report an image that cannot be used, in one line."""
        self._note_refused(source.path, source.label, _as_input_error(source, error))

    def _note_refused(self, path: Path, label: str, error: InputError) -> None:
        self.refused.append((label, str(error)))
        self._on_error(path, error)

    def _note_mask(self, source: Source, record: Record) -> None:
        self.masks.append(self.folder / f"{source.stem}{record.mask_suffix}")
        self._rows += record.areas

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
            path = write_mask(mask, self.folder)
            record = Record(
                key=self._keys[source],
                mask_suffix=next(suffix for suffix in MASK_SUFFIXES if path.name == f"{source.stem}{suffix}"),
                mask_sha256=sha256(path),
                overlay_sha256=overlay_sha256,
                areas=area_rows(mask),
            )
            save_record(self.folder, source.stem, record)
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


def _log_error(_path: Path, error: InputError) -> None:
    LOG.warning("%s", error)


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
    count = len(os.fsencode(f"{source.stem}{MASK_SUFFIXES[0]}"))
    if count > max_name_bytes:
        raise InputError(
            f"{source.label}: the name of its mask would have {count} bytes, "
            f"and {max_name_bytes} are possible; rename it"
        )


def _digest(source: Source) -> str:
    try:
        digests = [sha256(file) for file in source.files]
    except OSError as error:
        raise InputError(f"{source.path} cannot be read: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
