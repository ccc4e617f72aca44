"""Segment images into a folder: masks, overlays, a table of areas; bad files are skipped, finished ones remembered."""

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from medseg_trt.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import atomic_file, sha256
from medseg_trt.finished import Finished, recall, remember, remove_leftovers
from medseg_trt.images import Image, Mask, Source, find_images, read_image, write_mask
from medseg_trt.overlay import write_overlay
from medseg_trt.preprocess import of_image
from medseg_trt.progress import LOG, track
from medseg_trt.segment_many import segment_many
from medseg_trt.session import open_session

AREAS = "areas.csv"
AREA_HEADER = ("file", "class", "label", "pixels", "mm2", "ml")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFolder:
    """What ``infer_to_folder`` has written."""

    masks: tuple[Path, ...]
    areas: Path
    kept: int  # masks of an earlier run


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

    Args:
        inputs: files and folders.
        bundle_folder: the bundle.
        output: where everything goes.
        backend: a key of ``session.BACKENDS``, or ``auto``.
        precision: one of the bundle's; None takes the best.
        overlay: also draw the masks over the images.
        batch: how many slices go through the network at once.
        threads: CPU threads; None leaves it to the back-end.
        resume: keep what an earlier run made of the same images with the same bundle and options.
        verify_key: the public key of who built the bundle; None checks its digests alone.
        on_error: told of every file that cannot be used.

    Raises:
        InputError: an input does not exist.
        UsageError: two masks would have the same name, or one would overwrite an input.
        ArtefactError: the bundle cannot be used.
    """
    bundle = load_bundle(bundle_folder, verify_key)
    sources = find_images(inputs)
    _require_distinct_outputs(sources, output)
    if resume:
        remove_leftovers(output)
    done: list[Finished] = []
    kept = 0
    try:
        with open_session(bundle, backend, threads, precision) as session:
            made_by = (
                f"bundle {sha256(bundle.folder / MANIFEST)}, {session.description}, batch {batch}, overlay {overlay}"
            )
            keys: dict[Source, str] = {}
            label = sources[0].name if len(sources) == 1 else None  # one bar: of the files, or of its slices
            images = _read(sources, keys, made_by, output if resume else None)
            tracked = track(sources, "infer") if label is None else sources
            with closing(segment_many(images, session, bundle, batch, label)) as segmented:
                for source, found in zip(tracked, segmented, strict=True):
                    try:
                        if isinstance(found, InputError):
                            raise found
                        if isinstance(found, Finished):
                            kept += 1
                        else:
                            image, mask = found
                            found = _write(source, image, mask, bundle, output, overlay, keys[source])
                    except InputError as error:
                        on_error(source.path, error)
                    else:
                        done.append(found)
    finally:  # what was finished before an interrupt is in the table too
        _write_csv([AREA_HEADER, *(row for finished in done for row in finished.areas)], output / AREAS)
    if kept:
        LOG.info("%d mask(s) of an earlier run were kept", kept)
    return MaskFolder(masks=tuple(output / finished.mask for finished in done), areas=output / AREAS, kept=kept)


def _read(
    sources: Sequence[Source], keys: dict[Source, str], made_by: str, finished_in: Path | None
) -> Iterator[Image | Finished | InputError]:
    """Yield every image, or what is finished of it, or why it cannot be used; note the keys of the records."""
    for source in sources:
        try:
            keys[source] = f"image {_digest(source)}, {made_by}"
            finished = recall(finished_in, source.stem, keys[source]) if finished_in is not None else None
            yield read_image(source) if finished is None else finished
        except InputError as error:
            yield error


def _write(source: Source, image: Image, mask: Mask, bundle: Bundle, output: Path, overlay: bool, key: str) -> Finished:
    """Write what is made of one image, and remember that it is finished."""
    files = [write_mask(mask, output)]
    if overlay:
        files.append(output / "overlays" / f"{source.stem}.png")
        write_overlay(image, mask, of_image(bundle.preprocessing, image.pixels).window, files[-1])
    digests = {file.relative_to(output).as_posix(): sha256(file) for file in files}
    finished = Finished(key=key, files=digests, areas=_area_rows(mask))
    remember(output, source.stem, finished)
    return finished


def _digest(source: Source) -> str:
    try:
        digests = [sha256(file) for file in source.files]
    except OSError as error:
        raise InputError(f"{source.path} cannot be read: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _require_distinct_outputs(sources: Sequence[Source], output: Path) -> None:
    if any(file.resolve().parent == output.resolve() for source in sources for file in source.files):
        raise UsageError(f"{output} holds the images, and masks would overwrite them; choose another folder with -o")
    seen: dict[str, Path] = {}
    for source in sources:
        if (other := seen.setdefault(source.stem, source.path)) is not source.path:
            raise UsageError(
                f"{other} and {source.path} would share the name of their masks; run them into two folders"
            )


def _area_rows(mask: Mask) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            mask.name,
            area.name,
            str(label),
            str(area.pixels),
            "" if area.mm2 is None else f"{area.mm2:.3f}",
            "" if area.ml is None else f"{area.ml:.4f}",
        )
        for label, area in enumerate(mask.areas(), 1)
    )


def _write_csv(rows: Sequence[Sequence[str]], path: Path) -> None:
    text = StringIO()
    csv.writer(text).writerows(rows)
    with atomic_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
