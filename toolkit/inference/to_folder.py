"""Segment images into a folder: masks, overlays, a table of areas; bad files are skipped, finished ones remembered."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.errors import InputError, MedsegError, MissingExtraError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import MASK_SUFFIXES, Image, Mask, Source, read_image, write_mask
from medseg_trt.imaging.listing import LeftOut, list_images
from medseg_trt.imaging.overlay import write_overlay
from medseg_trt.imaging.preprocess import of_image
from medseg_trt.inference.areas_table import Row, area_rows, merge_areas
from medseg_trt.inference.output_folder import name_limit, require_safe
from medseg_trt.inference.pipelined import Failure, segment_many
from medseg_trt.inference.resume import Record, load_record, overlay_path, remove_leftovers, save_record
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.open import open_session

OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR)  # other errors of a disk concern all files


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFolder:
    """What ``infer_to_folder`` has written, and what it has not."""

    masks: tuple[Path, ...]
    areas: Path
    kept: int  # masks of an earlier run
    refused: tuple[tuple[str, str], ...]  # every input that could not be used, and why
    left_out: tuple[LeftOut, ...]  # what lies in the folders and was not taken for an image


@dataclass(kw_only=True, slots=True)
class _Done:
    """What has been done so far."""

    on_error: Callable[[Path, InputError], None]
    masks: list[Path] = field(default_factory=list[Path])
    rows: list[Row] = field(default_factory=list[Row])
    kept: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def refuse(self, path: Path, label: str, error: InputError) -> None:
        self.refused.append((label, str(error)))
        self.on_error(path, error)


def infer_to_folder(
    inputs: Sequence[Path],
    bundle_folder: Path,
    output: Path,
    *,
    backend: str = "auto",
    precision: str | None = None,
    overlay: bool = False,
    batch: int = 4,
    threads: int | None = None,
    resume: bool = False,
    verify_key: Path | None = None,
    on_error: Callable[[Path, InputError], None],
) -> MaskFolder:
    """Segment images and write a mask each, ``areas.csv`` and, if wanted, ``overlays/``; a bad file stops only itself.

    What lies in a folder and is no image is logged as a warning. Rows of ``areas.csv`` whose masks an earlier run wrote
    stay in it.

    Args:
        inputs: files and folders.
        bundle_folder: the bundle.
        output: where everything goes.
        backend: a key of ``sessions.backends.BACKENDS``, or ``auto``.
        precision: one of the bundle's; None takes the best.
        overlay: also draw the masks over the images.
        batch: how many slices go through the network at once.
        threads: CPU threads; None leaves it to the back-end.
        resume: keep what an earlier run made of the same images with the same bundle and options.
        verify_key: the public key of who built the bundle; None checks its digests alone.
        on_error: told of every input that cannot be used.

    Raises:
        InputError: there is one input and it cannot be used, or there is no image at all.
        UsageError: two masks would have the same name, or one would overwrite an input or a link.
        ArtefactError: the bundle cannot be used.
    """
    bundle = load_bundle(bundle_folder, verify_key)
    listing = list_images(inputs, ignored=[output, bundle_folder])
    sources = listing.sources
    if not sources and len(listing.refused) == 1:
        raise listing.refused[0].error
    require_safe(output, sources)
    for line in listing.warnings():
        LOG.warning("%s", line)
    done = _Done(on_error=on_error)
    for refused in listing.refused:
        done.refuse(refused.path, str(refused.path), refused.error)
    if not sources:
        raise InputError(f"none of {len(done.refused)} inputs can be used; they are named above")
    if resume:
        remove_leftovers(output)
    longest_name = name_limit(output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with open_session(bundle, backend, threads, precision) as session:
            made_by = (
                f"bundle {sha256(bundle.folder / MANIFEST)}, {session.description}, batch {batch}, overlay {overlay}"
            )
            keys: dict[Source, str] = {}
            label = sources[0].name if len(sources) == 1 else None  # one bar: of the files, or of its slices
            images = _read(sources, keys, made_by, output if resume else None, longest_name)
            tracked = track(sources, "infer") if label is None else sources
            with closing(segment_many(images, session, bundle, batch, label)) as segmented:
                for source, found in zip(tracked, segmented, strict=True):
                    try:
                        if isinstance(found, InputError):
                            raise found
                        if isinstance(found, Failure):
                            raise _as_input_error(source, found.error)
                        if isinstance(found, Record):
                            done.kept += 1
                        else:
                            image, mask = found
                            found = _write(source, image, mask, bundle, output, overlay, keys[source])
                    except InputError as error:
                        done.refuse(source.path, source.label, error)
                    else:
                        done.masks.append(output / f"{source.stem}{found.mask_suffix}")
                        done.rows += found.areas
    finally:  # what was finished before an interrupt is in the table too
        areas = merge_areas(output, [path.name for path in done.masks], done.rows)
    if done.kept:
        LOG.info("%d mask(s) of an earlier run were kept", done.kept)
    return MaskFolder(
        masks=tuple(done.masks),
        areas=areas,
        kept=done.kept,
        refused=tuple(done.refused),
        left_out=listing.left_out,
    )


def _read(
    sources: Sequence[Source], keys: dict[Source, str], made_by: str, finished_in: Path | None, longest_name: int
) -> Iterator[Image | Record | InputError]:
    """Yield every image, or what is finished of it, or why it cannot be used; note the keys of the records."""
    for source in sources:
        try:
            _require_short_name(source, longest_name)
            keys[source] = f"image {_digest(source)}, {made_by}"
            finished = load_record(finished_in, source.stem, keys[source]) if finished_in is not None else None
            yield read_image(source) if finished is None else finished
        except (InputError, MissingExtraError) as error:
            yield _as_input_error(source, error)
        except MedsegError:
            raise
        except Exception as error:
            yield _as_input_error(source, error)


def _write(source: Source, image: Image, mask: Mask, bundle: Bundle, output: Path, overlay: bool, key: str) -> Record:
    """Write what is made of one image, the mask last, and remember that it is finished.

    Raises:
        InputError: it cannot be written, for a reason that concerns this image alone.
    """
    try:
        overlay_sha256 = None
        if overlay:
            path = overlay_path(output, source.stem)
            write_overlay(image, mask, of_image(bundle.preprocessing, image.pixels).window, path)
            overlay_sha256 = sha256(path)
        path = write_mask(mask, output)
        finished = Record(
            key=key,
            mask_suffix=next(suffix for suffix in MASK_SUFFIXES if path.name == f"{source.stem}{suffix}"),
            mask_sha256=sha256(path),
            overlay_sha256=overlay_sha256,
            areas=area_rows(mask),
        )
        save_record(output, source.stem, finished)
    except OSError as error:
        if error.errno not in OF_ONE_NAME:
            raise
        raise InputError(f"{source.label}: its mask cannot be written: {error.strerror}; rename the image") from error
    except MedsegError:
        raise
    except Exception as error:
        raise _as_input_error(source, error) from error
    return finished


def _as_input_error(source: Source, error: Exception) -> InputError:
    """Return one line for any error that concerns one image alone."""
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


def _require_short_name(source: Source, longest_name: int) -> None:
    count = len(os.fsencode(f"{source.stem}{MASK_SUFFIXES[0]}"))
    if count > longest_name:
        raise InputError(
            f"{source.label}: the name of its mask would have {count} bytes, and {longest_name} are possible; rename it"
        )


def _digest(source: Source) -> str:
    try:
        digests = [sha256(file) for file in source.files]
    except OSError as error:
        raise InputError(f"{source.path} cannot be read: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
