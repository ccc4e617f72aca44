"""Group the DICOM files of a folder into series.

Files of one series have the same series UID, size and orientation. Anonymisers repeat or scatter UIDs: no file is left
out for its UID, and evenly spaced single slices are grouped although each has its own series UID.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_file import Header, NotAnImageError, read_header
from medseg_trt.imaging.formats.dicom_stack import in_order, same_direction, stack_of
from medseg_trt.progress import LOG

MIN_SCATTERED = 3  # slices with a series UID each; even spacing of fewer may be chance


def find_series(folder: Path, files: Sequence[Path]) -> Iterator[tuple[str | None, tuple[Path, ...]]]:
    """Group DICOM files into images; yield the stem of each and its files. A single file has no stem yet.

    A single series is named after its folder; several have their SeriesNumber appended. Slices of one series that
    differ in orientation or size, such as a scout view, are separate images. An unreadable file is yielded alone, so
    that reading it raises the reason. Objects that are not images are left out with a warning.

    Raises:
        MissingExtraError: pydicom is not installed.
    """
    headers: list[Header] = []
    left_out: list[tuple[str, Path]] = []
    for path in files:
        try:
            headers.append(read_header(path))
        except NotAnImageError as error:
            left_out.append((error.kind, path))
        except InputError:
            yield None, (path,)
    if left_out:
        LOG.warning("%s: left out, because they are not images: %s", folder, _summary(left_out))
    groups: list[list[Header]] = []
    placed_series = {header.series for header in headers if header.planes}
    for header in sorted(headers, key=_series_key):
        if not header.planes and header.series and header.series in placed_series:
            LOG.warning("%s has no position in its series; it becomes a separate image", header.path)
        if header.shape[0] > 1 or not header.planes:
            yield None, (header.path,)
            continue
        group = next((group for group in reversed(groups) if _belong_together(group[0], header)), None)
        if group is None:
            groups.append([header])
        else:
            group.append(header)
    groups = _gather_scattered(folder, groups)
    name = folder.resolve().name or "series"
    if len(groups) == 1:
        yield name, tuple(header.path for header in groups[0])
        return
    for number, same_number in groupby(groups, key=lambda group: group[0].number):
        parts = sorted(same_number, key=len, reverse=True)
        for index, group in enumerate(parts, 1):
            stem = f"{name}-series{'' if number is None else number}" + (f"-{index}" if len(parts) > 1 else "")
            yield stem, tuple(header.path for header in group)


def _summary(left_out: Sequence[tuple[str, Path]]) -> str:
    """Return the number of objects of each type, with the first file's name."""
    counts = Counter(kind for kind, _ in left_out)
    first = {kind: path.name for kind, path in reversed(left_out)}
    return ", ".join(
        f"{first[kind]} ({kind})" if count == 1 else f"{first[kind]} and {count - 1} more ({kind})"
        for kind, count in counts.items()
    )


def _series_key(header: Header) -> tuple[int, str, str]:
    return (-1 if header.number is None else header.number, header.series, str(header.path))


def _belong_together(one: Header, other: Header) -> bool:
    labels = [(header.series, header.number, header.modality, header.shape) for header in (one, other)]
    return labels[0] == labels[1] and same_direction(one.planes[0], other.planes[0])


def _gather_scattered(folder: Path, groups: Sequence[list[Header]]) -> list[list[Header]]:
    """Group evenly spaced single slices that differ only in their series UID.

    Slices that are not evenly spaced, or too few to exclude chance, stay separate images, with a warning.
    """
    rows: list[list[Header]] = []
    for group in groups:
        if len(group) == 1:
            row = next((row for row in rows if _could_be_one_series(row[0], group[0])), None)
            if row is None:
                rows.append(list(group))
            else:
                row.append(group[0])
    gathered = [group for group in groups if len(group) > 1]
    for row in rows:
        studies: dict[str, list[Header]] = {}
        for header in row:
            studies.setdefault(header.study, []).append(header)
        if len(row) >= MIN_SCATTERED and len(studies) == len(row) and _reason_against_one_volume(folder, row) is None:
            LOG.warning(
                "%s: %d evenly spaced slices have a StudyInstanceUID each; each becomes a separate image; "
                "to make them one volume, give them the same StudyInstanceUID",
                folder,
                len(row),
            )
        for slices in studies.values():
            gathered += _one_volume_or_each_its_own(folder, slices)
    return sorted(gathered, key=lambda group: _series_key(group[0]))


def _one_volume_or_each_its_own(folder: Path, slices: list[Header]) -> list[list[Header]]:
    if len(slices) == 1:
        return [slices]
    reason = _reason_against_one_volume(folder, slices)
    scattered = f"{folder}: {len(slices)} slices with the same description have a SeriesInstanceUID each"
    if reason is None:
        LOG.warning("%s; they are evenly spaced and are read as one volume", scattered)
        return [slices]
    LOG.warning("%s; each becomes a separate image, because %s", scattered, reason)
    return [[header] for header in slices]


def _could_be_one_series(one: Header, other: Header) -> bool:
    labels = [(header.number, header.description, header.modality, header.shape) for header in (one, other)]
    return labels[0] == labels[1] and same_direction(one.planes[0], other.planes[0])


def _reason_against_one_volume(folder: Path, headers: Sequence[Header]) -> str | None:
    if len(headers) < MIN_SCATTERED:
        return "two are too few to decide whether they are one volume"
    try:
        stack_of(folder, in_order([header.planes[0] for header in headers]))
    except InputError as error:
        return str(error).removeprefix(f"{folder}: ")
    return None
