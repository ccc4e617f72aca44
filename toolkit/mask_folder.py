"""Segment images into a folder: masks, overlays, a table of areas; bad files are skipped, finished ones remembered."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from medseg_trt.bundle import MANIFEST, load_bundle
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import atomic_file, sha256
from medseg_trt.finished import Finished, recall, remember, remove_leftovers
from medseg_trt.images import Mask, find_images, output_stem, write_mask
from medseg_trt.overlay import write_overlay
from medseg_trt.pipeline import segment_file
from medseg_trt.progress import LOG, track
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
    overlay: bool = False,
    batch: int = 4,
    threads: int | None = None,
    resume: bool = False,
    on_error: Callable[[Path, InputError], None],
) -> MaskFolder:
    """Segment images and write a mask each, ``areas.csv`` and, if wanted, ``overlays/``; a bad file stops only itself.

    Args:
        inputs: files and folders.
        bundle_folder: the bundle.
        output: where everything goes.
        backend: a key of ``session.BACKENDS``, or ``auto``.
        overlay: also draw the masks over the images.
        batch: how many slices go through the network at once.
        threads: CPU threads; None leaves it to the back-end.
        resume: keep what an earlier run made of the same images with the same bundle and options.
        on_error: told of every file that cannot be used.

    Raises:
        InputError: an input does not exist.
        UsageError: two masks would have the same name, or one would overwrite an input.
        ArtefactError: the bundle cannot be used.
    """
    bundle = load_bundle(bundle_folder)
    paths = find_images(inputs)
    _require_distinct_outputs(paths, output)
    if resume:
        remove_leftovers(output)
    done: list[Finished] = []
    kept = 0
    try:
        with open_session(bundle, backend, threads) as session:
            made_by = (
                f"bundle {sha256(bundle.folder / MANIFEST)}, {session.description}, batch {batch}, overlay {overlay}"
            )
            for path in track(paths, "infer") if len(paths) > 1 else paths:
                try:
                    key = f"image {_digest(path)}, {made_by}"
                    finished = recall(output, output_stem(path), key) if resume else None
                    kept += finished is not None
                    if finished is None:
                        label = path.name if len(paths) == 1 else None  # one bar: of the files, or of its slices
                        image, mask = segment_file(path, session.run, bundle, batch, label)
                        files = [write_mask(mask, output)]
                        if overlay:
                            files.append(output / "overlays" / f"{output_stem(path)}.png")
                            write_overlay(image, mask, bundle.preprocessing.window, files[-1])
                        digests = {file.relative_to(output).as_posix(): sha256(file) for file in files}
                        finished = Finished(key=key, files=digests, areas=_area_rows(mask))
                        remember(output, output_stem(path), finished)
                except InputError as error:
                    on_error(path, error)
                else:
                    done.append(finished)
    finally:  # what was finished before an interrupt is in the table too
        _write_csv([AREA_HEADER, *(row for finished in done for row in finished.areas)], output / AREAS)
    if kept:
        LOG.info("%d mask(s) of an earlier run were kept", kept)
    return MaskFolder(masks=tuple(output / finished.mask for finished in done), areas=output / AREAS, kept=kept)


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _require_distinct_outputs(paths: Sequence[Path], output: Path) -> None:
    if any(path.resolve().parent == output.resolve() for path in paths):
        raise UsageError(f"{output} holds the images, and masks would overwrite them; choose another folder with -o")
    seen: dict[str, Path] = {}
    for path in paths:
        stem = output_stem(path)
        if stem in seen:
            raise UsageError(f"{seen[stem]} and {path} would share the name of their masks; run them into two folders")
        seen[stem] = path


def _area_rows(mask: Mask) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            mask.path.name,
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
