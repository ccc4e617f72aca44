import json

import pytest

from medseg_trt.bench.schema import REPORT, SCHEMA, read_bench_report
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
    assert row.latency["model"].samples_ms == [each for taken in row.latency["model"].rounds_ms for each in taken]


def damaged(measured, change) -> dict:
    data = json.loads(json.dumps(to_dict(measured.report)))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=1), f"has schema 1; this version reads {SCHEMA}. Measure again"),
        (lambda data: data.pop("schema"), "has schema None"),
        (lambda data: data.update(extra=1), "Report extra: Unexpected keyword argument"),
        (lambda data: data.pop("tier"), "Report tier: Field required"),
        (lambda data: data.update(rows=[]), "there is no row"),
        (lambda data: data["rows"][0].pop("executed"), "Report rows.0.executed"),
        (lambda data: data["rows"][1]["verdict"].update(limit="much"), "Report rows.1.verdict"),
        (lambda data: data["rows"][1]["latency"].update(nowhere={"reason": "x"}), "rows.1.latency.nowhere"),
    ],
)
def test_what_is_no_report_is_named_with_its_file_and_field(measured, tmp_path, change, message):
    path = tmp_path / "old.json"
    write_json(path, damaged(measured, change))
    with pytest.raises(ArtefactError, match=rf"{path}") as raised:
        read_bench_report(path)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "no valid JSON"), ("[" * 10**5, "JSON")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_bench_report(path)
