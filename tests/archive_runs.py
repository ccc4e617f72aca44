"""Generated archives, and what a run over one plans and writes."""

import csv
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from dicoms import AXIAL, corners, dataset, placed, save
from tiny import picture

from medseg_trt.archive.mask_tree import MaskTree
from medseg_trt.archive.plan import Plan, make_plan
from medseg_trt.archive.request import ArchiveRequest, Part
from medseg_trt.errors import InputError
from medseg_trt.pipeline import infer


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 52)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(picture(seed, size)[0]).save(path)
    return path


def slices(seed: int, count: int = 3) -> np.ndarray:
    return np.stack([picture(10 * seed + number, (36, 28))[0] for number in range(count)]).astype(np.int16)


def save_slices(paths: Sequence[Path], pixels: np.ndarray, **elements: Any) -> None:
    """Write a series, one slice for each path."""
    for path, values, corner in zip(paths, pixels, corners(len(pixels)), strict=True):
        save(path, dataset(values, **(placed(AXIAL, corner) | {"SliceThickness": 3.0} | elements)))


def plan_of(inputs: Sequence[Path], output: Path, *, part: Part | None = None, **request: Any) -> Plan:
    return make_plan(inputs, ArchiveRequest(**request), [], output, part)


def planned(inputs: Sequence[Path], output: Path, **request: Any) -> dict[str, tuple[str, ...]]:
    """Return the stem of every image, in order, and the names of its files."""
    with closing(plan_of(inputs, output, **request)) as plan:
        return {source.stem: tuple(path.name for path in source.files) for source in plan}


def reasons(inputs: Sequence[Path], output: Path, **request: Any) -> dict[str, tuple[str, bool]]:
    """Return why files are not segmented, by name, and whether that is an error."""
    with closing(plan_of(inputs, output, **request)) as plan:
        return {Path(item.file).name: (item.reason, item.refused) for item in plan.skipped()}


def segment_tree(
    inputs: Sequence[Path],
    bundle: Path,
    output: Path,
    *,
    part: Part | None = None,
    resume: bool = False,
    overlay: bool = False,
    on_error: Callable[[Path, InputError], None] | None = None,
    **request: Any,
) -> MaskTree:
    written = MaskTree(
        output, ArchiveRequest(**request), part=part, resume=resume, overlay=overlay, on_error=on_error or refused
    )
    for _ in infer(inputs, bundle, destination=written, backend="onnxruntime", threads=1):
        pass
    return written


def refused(path: Path, error: InputError) -> None:
    raise AssertionError(f"{path}: {error}")


def content(folder: Path, records: bool = False) -> dict[str, bytes]:
    """Return the bytes of every file in a tree; records, whose seals are of a user, only on request."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (records or ".finished" not in path.parts)
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]
