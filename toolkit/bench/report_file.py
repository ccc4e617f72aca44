"""Read ``report.json``. A report may come from anywhere, so its size is limited before its content is checked.

The demo's report of the tier "report" has 8,796 times and 5,700 other values in 0.29 MB. At the tier "certify" it would
have 60 times as many times: 0.53 million in 12 MB. The limits are eight times as high or more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from medseg_trt.bench.schema import READABLE, SCHEMA, Report
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.files import parse_json, read_limited
from medseg_trt.spec import from_dict

REPORT = "report.json"
RENAMED: Mapping[str, str] = {"flavour": "variant"}  # fields of rows of schema 3: old name -> new name
MAX_BYTES = 96 << 20
MAX_NUMBERS = 1 << 22  # all values, most of which are times and pixel counts
MAX_VALUES = 1 << 18  # values but times and pixel counts: a wrong one may cost a kilobyte, for its error


def read_bench_report(path: Path) -> Report:
    """Read what ``bench`` wrote: a ``report.json``, or the folder that it lies in.

    Raises:
        InputError: there is no such file, or it is no JSON.
        ArtefactError: it is too large, of another schema, or not what a report must be.
    """
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; make a report: medseg-trt bench -o DIR")
    content = read_limited(path, MAX_BYTES)
    if content.count(b",") > MAX_NUMBERS:
        raise ArtefactError(f"{path} holds more than {MAX_NUMBERS:,} values; it is not to be trusted")
    try:
        data = parse_json(path, content)
    except ArtefactError as error:
        raise InputError(str(error)) from error
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if fields.get("schema") not in READABLE:
        raise ArtefactError(
            f"{path} has schema {fields.get('schema')!r}; this version reads {' and '.join(map(str, READABLE))}. "
            "Measure again: medseg-trt bench -o DIR"
        )
    if count_values(fields) > MAX_VALUES:
        raise ArtefactError(
            f"{path} holds more than {MAX_VALUES:,} values beside times and pixel counts; it is not to be trusted"
        )
    report = from_dict(Report, fields if fields["schema"] == SCHEMA else _renamed(fields), str(path))
    if not report.rows:
        raise ArtefactError(f"{path}: Report rows: there is no row")
    return report


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a report of schema 3 with the names of today."""
    rows = fields.get("rows")
    if not isinstance(rows, list):
        return fields
    return fields | {"rows": [_renamed_row(row) for row in cast("list[object]", rows)]}


def _renamed_row(row: object) -> object:
    if not isinstance(row, dict):
        return row
    fields = cast("dict[str, object]", row)
    return {RENAMED.get(name, name): value for name, value in fields.items()}


def count_values(data: object) -> int:
    """Return the number of values of parsed JSON, nested ones included, without well-formed times and pixel counts."""
    count = 0
    remaining = [data]
    while remaining:
        value = remaining.pop()
        count += 1
        if isinstance(value, dict):
            fields = cast("dict[str, object]", value)
            remaining += [part for name, part in fields.items() if not _is_measurement(name, part)]
        elif isinstance(value, list):
            remaining += cast("list[object]", value)
    return count


def _is_measurement(name: str, value: object) -> bool:
    """Say whether a field holds rounds of times, or triples of pixel counts."""
    if name not in ("rounds_ms", "counts") or not isinstance(value, list):
        return False
    rows = cast("list[object]", value)
    return all(isinstance(row, list) and _is_row(name, cast("list[object]", row)) for row in rows)


def _is_row(name: str, numbers: list[object]) -> bool:
    if name == "rounds_ms":
        return all(isinstance(number, float) for number in numbers)
    return len(numbers) == 3 and all(isinstance(number, int) and 0 <= number < 1 << 53 for number in numbers)
