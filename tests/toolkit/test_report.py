import json
from dataclasses import replace

import pytest

from medseg_trt.measure import Timing
from medseg_trt.report import HEADER, SCHEMA, BenchRow, Report, machine, to_markdown, write_report


def row(name: str, median_ms: float) -> BenchRow:
    return BenchRow(
        name=name,
        backend="onnxruntime",
        device="CPU",
        executed=True,
        max_abs_error=3.25e-6,
        agreement=0.99987,
        mean_dice=0.87654,
        timing=Timing(median_ms=median_ms, p90_ms=31.41, min_ms=9.5, max_ms=99.5, runs=271),
        size_mb=12.34,
    )


REPORT = Report(
    images="14 slices of generated, split val",
    batch=2,
    rows=(row("PyTorch", 30.0), row("ONNX Runtime", 12.0)),
    machine={"processor": "made up", "cores": 2, "system": "Linux", "python": "3.11.7", "versions": {"numpy": "2.4.6"}},
)


def markdown_rows(page: str) -> list[dict[str, str]]:
    """Read the only table of a Markdown page."""
    lines = [line.strip("| ") for line in page.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split(" | ")] for line in lines)
    return [dict(zip(header, cells, strict=True)) for cells in rows]


@pytest.fixture
def written(tmp_path):
    page = write_report(REPORT, tmp_path / "report")
    return json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8")), page.read_text(encoding="utf-8")


def test_markdown_and_json_hold_the_same_figures(written):
    data, page = written
    shown = markdown_rows(page)
    assert len(shown) == len(data["rows"]) == 2
    reference_ms = data["rows"][0]["timing"]["median_ms"]
    for cells, entry in zip(shown, data["rows"], strict=True):
        # A figure is shown with the digits that the cell has, so it is off by half of the last one at most.
        assert cells["network"] == f"{entry['name']} ({entry['device']})"
        assert float(cells["median ms"]) == pytest.approx(entry["timing"]["median_ms"], abs=0.005)
        assert float(cells["p90 ms"]) == pytest.approx(entry["timing"]["p90_ms"], abs=0.005)
        assert int(cells["runs"]) == entry["timing"]["runs"]
        assert float(cells["speed"].rstrip("x")) == pytest.approx(
            reference_ms / entry["timing"]["median_ms"], abs=0.005
        )
        assert float(cells["max abs error"]) == pytest.approx(entry["max_abs_error"], rel=0.05)
        assert float(cells["agreement"].rstrip(" %")) == pytest.approx(100 * entry["agreement"], abs=0.0005)
        assert float(cells["mean Dice"]) == pytest.approx(entry["mean_dice"], abs=0.00005)
        assert float(cells["size MB"]) == pytest.approx(entry["size_mb"], abs=0.05)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"name": "other"}, "network"),
        ({"device": "GPU"}, "network"),
        ({"executed": False}, "network"),
        ({"max_abs_error": 0.5}, "max abs error"),
        ({"agreement": 0.5}, "agreement"),
        ({"mean_dice": 0.5}, "mean Dice"),
        ({"mean_dice": None}, "mean Dice"),
        ({"size_mb": 0.5}, "size MB"),
        ({"timing": replace(REPORT.rows[1].timing, p90_ms=0.5)}, "p90 ms"),
        ({"timing": replace(REPORT.rows[1].timing, runs=5)}, "runs"),
    ],
)
def test_each_figure_has_its_own_column(change, column):
    changed = replace(REPORT, rows=(REPORT.rows[0], replace(REPORT.rows[1], **change)))
    before, after = (markdown_rows(to_markdown(report))[1] for report in (REPORT, changed))
    assert [name for name in HEADER if before[name] != after[name]] == [column]


def test_speed_is_relative_to_the_first_row():
    speeds = [cells["speed"] for cells in markdown_rows(to_markdown(REPORT))]
    assert speeds == ["1.00x", "2.50x"]  # 30 ms against 12 ms


def test_the_json_file_is_the_whole_report_with_its_schema(written):
    data, _ = written
    assert data == {"schema": SCHEMA, **json.loads(json.dumps(REPORT.to_dict()))}
    assert set(data) == {"schema", "images", "batch", "rows", "machine"}
    assert set(data["rows"][0]) == {
        "name", "backend", "device", "executed", "max_abs_error", "agreement", "mean_dice", "timing", "size_mb",
    }  # fmt: skip
    assert set(data["rows"][0]["timing"]) == {"median_ms", "p90_ms", "min_ms", "max_ms", "runs"}


def test_the_page_says_what_was_measured_and_on_what(written):
    _, page = written
    for words in ("14 slices of generated, split val", "Batch 2", "made up, 2 cores", "Python 3.11.7", "numpy 2.4.6"):
        assert words in page
    assert "not a medical device" in page


def test_a_bar_in_a_name_does_not_break_the_table():
    report = replace(REPORT, rows=(row("a|b.pt", 1.0),))
    (line,) = [line for line in to_markdown(report).splitlines() if "b.pt" in line]
    assert line.replace("\\|", "").count("|") == len(HEADER) + 1


def test_this_machine_is_described_for_json():
    found = machine()
    assert found["cores"] >= 1
    assert found["versions"].keys() >= {"medseg-trt", "numpy"}
    assert json.loads(json.dumps(found)) == found
