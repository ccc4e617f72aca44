"""Group the DICOM files of a folder into series.

Files of one series have the same series UID, size and orientation. Anonymisers repeat or scatter UIDs: no file is left
out for its UID, and evenly spaced slices are grouped although their series UIDs differ.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_file import Header, NotAnImageError, missing_geometry, number_of, read_header
from medseg_trt.imaging.formats.dicom_stack import in_order, same_direction, stack_of
from medseg_trt.progress import LOG

MIN_SCATTERED = 3  # slices of several series; even spacing of fewer may be chance


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
    concatenations: dict[str, list[Header]] = {}
    placed_series = {header.series for header in headers if header.planes}
    for header in sorted(headers, key=_series_key):
        if not header.planes and header.series and header.series in placed_series:
            LOG.warning("%s has no position in its series; it becomes a separate image", header.path)
        concatenation = str(header.elements.get("ConcatenationUID") or "")
        if concatenation and header.planes:
            concatenations.setdefault(concatenation, []).append(header)
            continue
        if header.shape[0] > 1 or not header.planes:
            yield None, (header.path,)
            continue
        group = next((group for group in reversed(groups) if _belong_together(group[0], header)), None)
        if group is None:
            groups.append([header])
        else:
            group.append(header)
    _warn_of_missing_geometry(folder, [header for header in headers if header.series not in placed_series])
    _warn_of_missing_parts(folder, concatenations.values())
    yield from ((None, (parts[0].path,)) for parts in concatenations.values() if len(parts) == 1)
    groups += [parts for parts in concatenations.values() if len(parts) > 1]
    groups = _gather_scattered(folder, groups)
    _warn_of_split_series(folder, groups)
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
    """Group evenly spaced slices that differ only in their series UID.

    Series that are not evenly spaced together, or too few slices to exclude chance, stay separate images; single slices
    with a warning.
    """
    rows: list[list[list[Header]]] = []
    for group in groups:
        row = next((row for row in rows if _could_be_one_series(row[0][0], group[0])), None)
        if row is None:
            rows.append([group])
        else:
            row.append(group)
    gathered: list[list[Header]] = []
    for row in rows:
        studies: dict[str, list[list[Header]]] = {}
        for group in row:
            studies.setdefault(group[0].study, []).append(group)
        slices = [group[0] for group in row if len(group) == 1]
        is_scattered = len(slices) == len(row) == len(studies) >= MIN_SCATTERED
        if is_scattered and _reason_against_one_volume(folder, slices) is None:
            LOG.warning(
                "%s: %d evenly spaced slices have a StudyInstanceUID each; each becomes a separate image; "
                "to make them one volume, give them the same StudyInstanceUID",
                folder,
                len(row),
            )
        for parts in studies.values():
            gathered += _one_volume_or_its_parts(folder, parts)
    return sorted(gathered, key=lambda group: _series_key(group[0]))


def _one_volume_or_its_parts(folder: Path, parts: list[list[Header]]) -> list[list[Header]]:
    slices, larger = [part[0] for part in parts if len(part) == 1], [part for part in parts if len(part) > 1]
    if larger and len(parts) > 1:
        headers = [header for part in parts for header in part]
        if _reason_against_one_volume(folder, headers) is None:
            LOG.warning(
                "%s: %d series with the same number and description are evenly spaced together; they are read as one "
                "volume",
                folder,
                len(parts),
            )
            return [headers]
    return larger + (_one_volume_or_each_its_own(folder, slices) if slices else [])


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
    labels = [(header.number, header.description, header.modality, header.shape[1:]) for header in (one, other)]
    return labels[0] == labels[1] and same_direction(one.planes[0], other.planes[0])


def _warn_of_missing_geometry(folder: Path, headers: Sequence[Header]) -> None:
    lacking: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        if not header.planes and (missing := missing_geometry(header)):
            lacking.setdefault(missing, []).append(header)
    for missing, slices in lacking.items():
        LOG.warning(
            "%s: %d slice(s) lack %s, so each becomes a separate image: %s%s",
            folder,
            len(slices),
            " and ".join(missing),
            slices[0].path.name,
            " …" if len(slices) > 1 else "",
        )


def _warn_of_missing_parts(folder: Path, concatenations: Iterable[Sequence[Header]]) -> None:
    for parts in concatenations:
        stated = max(int(number_of(part.elements, "InConcatenationTotalNumber") or 0) for part in parts)
        if stated > len(parts):
            LOG.warning(
                "%s: %d of the %d files that a volume is divided into are missing; export it again",
                folder,
                stated - len(parts),
                stated,
            )


def _warn_of_split_series(folder: Path, groups: Sequence[Sequence[Header]]) -> None:
    counts = Counter(series for group in groups for series in {header.series for header in group} if series)
    split = [count for count in counts.values() if count > 1]
    if split:
        LOG.warning(
            "%s: the slices of %d series differ in direction, pixel spacing or size and become %d separate images",
            folder,
            len(split),
            sum(split),
        )


def _reason_against_one_volume(folder: Path, headers: Sequence[Header]) -> str | None:
    if sum(header.shape[0] for header in headers) < MIN_SCATTERED:
        return "two are too few to decide whether they are one volume"
    try:
        stack_of(folder, in_order([plane for header in headers for plane in header.planes]))
    except InputError as error:
        return str(error).removeprefix(f"{folder}: ")
    return None
