"""Check, before anything is written, that a run replaces only files that an earlier run has written."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.imaging.images import MASK_SUFFIXES, Source
from medseg_trt.inference.areas_table import AREAS, require_own_areas
from medseg_trt.inference.resume import OVERLAYS, RECORDS_FOLDER, overlay_path

Identity = tuple[int, int]  # device and number: the same file under whatever path


def require_safe(output: Path, sources: Sequence[Source]) -> None:
    """Refuse an output folder where masks would replace each other, an input or a link, or lie behind a link.

    Inputs are compared by name and by the target of their links.

    Raises:
        UsageError: a file would be replaced, or ``areas.csv`` is another kind of file.
    """
    _require_distinct_stems(sources)
    folders = [output, *require_own_folders(output)]
    identities = {identity for folder in folders if (identity := _identity(folder)) is not None}
    inputs: set[Identity] = set()
    for file in (file for source in sources for file in source.files):
        if {_identity(file.parent), _identity(file.resolve().parent)} & identities:
            raise UsageError(
                f"{output} holds the images, and masks would overwrite them; choose another folder with -o"
            )
        if (identity := _identity(file)) is not None:
            inputs.add(identity)
    for path in _outputs(output, sources):
        try:
            status = path.lstat()
        except OSError:
            continue  # no file, or none is possible: then writing the mask gives the reason
        if stat.S_ISLNK(status.st_mode) or (status.st_dev, status.st_ino) in inputs:
            raise UsageError(
                f"{path} is a link or one of the images, and a mask would replace it; choose another folder with -o"
            )
    require_own_areas(output)


def require_own_folders(output: Path, *further: Path) -> list[Path]:
    """Return the folders of records and of overlays in an output folder, and further ones.

    Raises:
        UsageError: one of them is a link or a file.
    """
    folders = [output / RECORDS_FOLDER, output / OVERLAYS, *further]
    for folder in folders:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UsageError(f"{folder} is a link or a file; remove it, or choose another folder with -o")
    return folders


def require_outside(output: Path, bundle: Path) -> None:
    """Refuse an output folder in the folder of the bundle.

    Raises:
        UsageError: it is there, or is a loop of links.
    """
    try:
        is_inside = output.resolve().is_relative_to(bundle.resolve())
    except RuntimeError as error:  # of Python 3.11 and 3.12
        raise UsageError(f"{output} is a link that leads to itself; choose another folder with -o") from error
    if is_inside:
        raise UsageError(f"{output} is in the bundle {bundle}; choose another folder with -o")


def _outputs(output: Path, sources: Sequence[Source]) -> Iterator[Path]:
    yield output / AREAS
    for source in sources:
        yield from (output / f"{source.stem}{suffix}" for suffix in MASK_SUFFIXES)
        yield overlay_path(output, source.stem)


def name_limit(output: Path) -> int:
    """Return the maximum length of a file name in bytes; the folder need not exist yet."""
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    return os.pathconf(existing, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255


def _require_distinct_stems(sources: Sequence[Source]) -> None:
    by_stem: dict[str, Source] = {}
    for source in sources:
        if (other := by_stem.setdefault(source.stem, source)) is not source:
            raise UsageError(
                f"{other.path} and {source.path} would share the name of their masks; run them into two folders"
            )


def _identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None  # no file, or a broken link: it equals no other file
    return status.st_dev, status.st_ino
