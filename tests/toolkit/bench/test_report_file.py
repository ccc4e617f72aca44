import json
import os
from dataclasses import replace
from typing import Any

import pytest

from medseg_trt.bench.report_file import MAX_BYTES, MAX_NUMBERS, MAX_VALUES, REPORT, count_values, read_bench_report
from medseg_trt.bench.schema import SCHEMA
from medseg_trt.bench.timing_schema import Latency
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.files import write_json
from medseg_trt.spec import to_dict


def test_a_report_is_read_as_it_was_written(measured, tmp_path):
    write_json(tmp_path / REPORT, to_dict(measured.report))
    assert read_bench_report(tmp_path) == read_bench_report(tmp_path / REPORT) == measured.report
    row = measured.report.row("pytorch fp32")
    assert row.role == "reference"
    assert isinstance(row.latency["model"], Latency)
    assert row.latency["model"].samples_ms == [time for times in row.latency["model"].rounds_ms for time in times]


def test_a_report_of_schema_3_is_read(measured, tmp_path):
    data: dict[str, Any] = to_dict(measured.report) | {"schema": 3}
    for row in data["rows"]:
        row["flavour"] = row.pop("variant")
        del row["on_gpu"]
    write_json(tmp_path / REPORT, data)
    report = read_bench_report(tmp_path)
    assert replace(report, schema=SCHEMA) == measured.report
    assert {row.variant for row in report.rows} > {"plain"}


def damaged(measured, change) -> dict:
    data = json.loads(json.dumps(to_dict(measured.report)))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=1), f"has schema 1; this version reads 3 and {SCHEMA}. Measure again"),
        (lambda data: data.pop("schema"), "has schema None"),
        (lambda data: data.update(extra=1), "extra is not a known field"),
        (lambda data: data.pop("tier"), "tier is missing"),
        (lambda data: data.update(rows=[]), "there is no row"),
        (lambda data: data["rows"][0].pop("executed"), "Report rows.0.executed"),
        (lambda data: data["rows"][1]["verdict"].update(limit="much"), "Report rows.1.verdict"),
        (lambda data: data["rows"][1]["latency"].update(nowhere={"reason": "x"}), "rows.1.latency.nowhere"),
    ],
)
def test_a_malformed_report_is_refused_with_its_file_and_field(measured, tmp_path, change, message):
    path = tmp_path / "old.json"
    write_json(path, damaged(measured, change))
    with pytest.raises(ArtefactError, match=rf"{path}") as raised:
        read_bench_report(path)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "no valid JSON"),
        ("[" * 10**5, "JSON"),
        ('{"schema": 3, "batch": Infinity}', "Infinity is not a finite number"),
        ('{"schema": 3, "batch": NaN}', "NaN is not a finite number"),
        ('{"schema": 3, "batch": 1e999}', "1e999 is not a finite number"),
    ],
)
def test_an_unreadable_report_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_bench_report(path)


def test_a_report_of_180_mb_is_refused_before_it_is_parsed(tmp_path):
    """The limit is by the file's size; a hole in a file has a size and needs no disk."""
    path = tmp_path / "report.json"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 180_000_000)
    assert MAX_BYTES < 180_000_000
    with pytest.raises(ArtefactError, match=r"larger than 96 MiB; it is not to be trusted") as raised:
        read_bench_report(path)
    assert "\n" not in str(raised.value)


def test_too_many_values_are_refused_before_they_are_parsed(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b'{"schema": 3, "rows": [' + b"," * (MAX_NUMBERS + 1))  # no JSON: the parser is not reached
    with pytest.raises(ArtefactError, match="more than 4,194,304 values"):
        read_bench_report(path)


def test_too_many_values_beside_the_measurements_are_refused_before_each_gets_an_error(tmp_path):
    """Without this limit, pydantic's errors of four million strings take some 8 GB: 2 kB each, measured at 400,000."""
    path = tmp_path / "report.json"
    write_json(path, {"schema": SCHEMA, "rows": [{"rounds_ms": [["a"] * (MAX_VALUES + 1)]}]})
    with pytest.raises(ArtefactError, match="more than 262,144 values beside times and pixel counts"):
        read_bench_report(path)


def test_times_and_pixel_counts_of_any_number_are_read(measured):
    """A long measurement of many slices has millions of both; they are the only ones that may."""
    data = damaged(measured, lambda data: None)
    others = count_values(data)
    assert others < MAX_VALUES / 8
    data["rows"][0]["latency"]["model"]["rounds_ms"] = [[1.5] * 10**6]
    data["rows"][0]["accuracy"]["slices"][0]["counts"] = [[1, 2, 3]] * 10**5
    assert count_values(data) == others


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds_ms", [[1.5, "1"]]), ("rounds_ms", [1.5]), ("counts", [[1, 2]]), ("counts", [[1, 2, 1 << 60]])],
)
def test_malformed_measurements_are_counted(name, value):
    assert count_values({name: value}) > 2
