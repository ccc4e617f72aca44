"""The pages: every figure is in the JSON, nothing is loaded from anywhere, what is missing says why."""

import html.parser
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from medseg_trt.bench.missing import Missing
from medseg_trt.bench.report import page as report_page
from medseg_trt.bench.report.figures import VARIABLES
from medseg_trt.bench.report.page import Figures, formatted
from medseg_trt.bench.report.write import HEADER, cells, table, write_report
from medseg_trt.spec import to_dict

OUR_WORDS = (
    "HD95",
    "p90",
    "p95",
    "p99",
    "99 %",
    "95 %",
    "90 %",
    "1.00",
)  # of the templates, no figures of a measurement
UNSEEN = ("style", "svg", "script", "title")
VOID = ("meta", "link", "img", "br")


class Page(html.parser.HTMLParser):
    """What a reader sees of a page: its figures with their places, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.figures: list[tuple[dict[str, Any], str]] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open or any(tag in UNSEEN for tag, _ in self.open):
            return
        if self.open[-1][0] == "data":
            self.figures.append((self.open[-1][1], data))
        elif data.strip():
            self.texts.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def written(measured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(measured, folder) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def data(written) -> dict[str, Any]:
    return json.loads((written / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(written) -> str:
    return (written / "index.html").read_text(encoding="utf-8")


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield " ".join(data.split())
    elif isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from strings(value)
    elif isinstance(data, list):
        for value in data:
            yield from strings(value)


def unknown_numbers(page: Page, data: Any) -> list[str]:
    """Return what a page shows beside its figures that has digits and stands in no string of the JSON."""
    known = sorted(
        {number for number in strings(data) if re.search(r"\d", number)} | set(OUR_WORDS), key=len, reverse=True
    )
    left: list[str] = []
    for shown in page.texts:
        rest = shown
        for number in known:
            rest = rest.replace(number, "")
        if re.search(r"\d", rest):
            left.append(shown)
    return left


def test_every_figure_of_the_page_is_in_the_json(text, data):
    page = Page(text)
    assert len(page.figures) > 300
    for attributes, shown in page.figures:
        value = at(data, attributes["data-path"])
        assert value == float(attributes["value"])
        assert shown == formatted(value, attributes["data-spec"], float(attributes["data-scale"]))
    assert unknown_numbers(page, data) == []


@pytest.mark.parametrize("plant", ["<p>and 4711 more</p>", "<td>0.98765</td>", "<p>in 17 ms</p>"])
def test_html_number_without_json_value_is_detected(text, data, plant):
    page = Page(text.replace("<main>", f"<main>{plant}"))
    assert len(unknown_numbers(page, data)) == len(unknown_numbers(Page(text), data)) + 1


def test_html_report_loads_no_external_resources(text):
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, name, address)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "<script" not in text


def test_hostile_names_are_escaped_in_html_and_markdown(measured, tmp_path):
    """A class, a case or a reason may be called anything; a dollar sign would begin a formula of Matplotlib."""
    name, short = "<script>alert(1)</script>[x](javascript:y)`$\\frac$|", "<script>$\\frac$|"
    rows = [replace(row, name=f"{short}{row.name}", energy=Missing(reason=name)) for row in measured.report.rows]
    report = replace(
        measured.report,
        reference=name,
        commands=(f"one\n\n{name}",),
        warnings=(name,),
        rows=tuple(rows),
    )
    write_report(replace(measured, report=report, worst_slices={}), tmp_path)
    page, markdown = ((tmp_path / file).read_text(encoding="utf-8") for file in ("index.html", "report.md"))
    assert "<script" not in page
    *lines, command = [line for line in markdown.splitlines() if "javascript" in line]
    lines += [line for line in markdown.splitlines() if "frac" in line and line != command]
    assert len(lines) >= len(report.rows) + 2
    assert not any("<script" in line or re.search(r"(?<!\\)[`\[\]]", line) for line in lines)
    assert command == f"    one\\n\\n{name}"  # in an indented block, where Markdown reads no HTML
    table_lines = [line for line in markdown.splitlines() if line.startswith("|")][: 2 + len(report.rows)]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table_lines}) == 1


def test_html_report_has_accessible_markup(text):
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert tags.count("table") == tags.count("caption") > 5
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 5
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))  # several drawings by one program name their parts alike
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert targets <= set(identifiers)


def test_drawings_take_their_colours_from_the_page(text):
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not set(VARIABLES) & set(re.findall(r"#[0-9a-f]{6}", drawings))
    used = set(re.findall(r"var\((--[\w-]+)\)", drawings))
    assert {"--ink", "--grid", "--series-0", "--series-1", "--piece-0"} <= used
    defined = re.findall(r"(--[\w-]+):", text)
    for name in used:
        assert defined.count(name) >= (1 if name == "--font" else 3)  # for light, dark and paper


def test_html_report_gives_the_reason_of_missing_energy(measured, text):
    reasons = {row.latency["model+transfers"].reason for row in measured.report.rows}
    assert len(reasons) == 1
    (energy,) = {row.energy.reason for row in measured.report.rows if isinstance(row.energy, Missing)} or {""}
    assert energy in " ".join(Page(text).texts)


def test_worst_slices_are_shown_with_their_pictures(measured, text):
    worst = sum(len(row.worst) for row in measured.report.rows)
    assert worst > 3
    shown_images = [attributes for tag, attributes in Page(text).tags if tag == "img"]
    assert len(shown_images) == 5 * worst  # image, drawn mask, reference, network, difference
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in shown_images)


def changed(measured: Any, **changes: Any) -> Any:
    rows = measured.report.rows
    return replace(measured, report=replace(measured.report, rows=(rows[0], replace(rows[1], **changes), *rows[2:])))


def test_a_hostile_name_stays_text(measured, tmp_path):
    name = '<script>alert("x")</script>|&'
    other = replace(measured.report, reference=name, commands=(name,), warnings=(name,))
    write_report(replace(measured, report=other), tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3
    classes = replace(measured.report.classes, names=(name, *measured.report.classes.names[1:]))
    assert "<script" not in report_page.html_page(
        replace(other, classes=classes), measured.worst_slices, measured.window
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failure": "it was killed by signal 11"}, "it was killed by signal 11"),
        (
            {"executed": False, "statement": "built, never executed: there is no GPU"},
            "built, never executed: there is no GPU",
        ),
        ({"warnings": ("model: unstable, times vary by 77.7 %",)}, "model: unstable, times vary by 77.7 %"),
        (
            {"throughput": Missing(reason="it died before"), "memory": Missing(reason="it died before")},
            "it died before",
        ),
    ],
)
def test_row_failures_and_statements_appear_in_the_html_report(measured, tmp_path, changes, words):
    other = changed(measured, **changes)
    write_report(other, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert any(words in text for text in page.texts)
    assert unknown_numbers(page, json.loads(json.dumps(to_dict(other.report)))) == []


def test_a_row_that_callers_cannot_share_has_a_reason_instead_of_their_throughput(measured, tmp_path):
    alone = measured.report.rows[1].throughput[:1]
    assert len(measured.report.rows[0].throughput) > 1
    other = changed(measured, throughput=alone)
    write_report(other, tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert report_page.ONE_CALLER in page.texts
    assert [where["data-path"] for where, _ in page.figures if "rows.1.throughput" in where["data-path"]] == [
        "rows.1.throughput.0.images_per_s"
    ]
    assert unknown_numbers(page, json.loads(json.dumps(to_dict(other.report)))) == []


def test_markdown_has_the_same_figures(written, data):
    text = (written / "report.md").read_text(encoding="utf-8")
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    rows = [
        dict(zip(lines[0].split(" | "), line.split(" | "), strict=True)) for line in lines[1 : 1 + len(data["rows"])]
    ]
    assert [row["network"] for row in rows] == [row["name"] for row in data["rows"]]
    for shown, row in zip(rows, data["rows"], strict=True):
        assert shown["median ms"] == f"{row['latency']['model']['median_ms']:.2f}"
        assert shown["p99 ms"] == f"{row['latency']['model']['p99_ms']:.2f}"
        assert shown["file to file ms"] == f"{row['latency']['end-to-end']['median_ms']:.2f}"
        assert shown["MB"] == f"{row['size_mb']:.1f}"
    assert [row["verdict"] for row in rows] == ["reference", *["holds"] * (len(rows) - 1)]
    assert "not a medical device" in text
    assert data["machine"]["processor"] in text
    for name in ("spleen", *(score["name"] for score in data["rows"][0]["accuracy"]["means"])):
        assert (f"| {name} |" in text) == (name != "spleen")


def test_the_terminal_shows_what_the_json_holds(measured):
    shown = [dict(zip(HEADER, row, strict=True)) for row in cells(measured.report)]
    for row, reported in zip(shown, measured.report.rows, strict=True):
        assert row["median ms"] == f"{reported.latency['model'].median_ms:.2f}"
        assert int(row["runs"]) == reported.latency["model"].runs
    references = {reported.verdict.reference for reported in measured.report.rows[1:]}
    assert [shown[0]["Dice"]] == [f"{reference:.4f}" for reference in references]  # which has no verdict of its own
    assert [row["Dice"] for row in shown[1:]] == [
        f"{reported.verdict.candidate:.4f}" for reported in measured.report.rows[1:]
    ]
    report = changed(
        measured, executed=False, latency=dict.fromkeys(measured.report.rows[0].latency, Missing(reason="x"))
    ).report
    row = dict(zip(HEADER, cells(report)[1], strict=True))
    assert (row["median ms"], row["runs"], row["verdict"]) == ("–", "–", "not executed")


def test_without_the_extra_the_json_is_written_and_the_rest_is_said(measured, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert write_report(measured, tmp_path) == tmp_path / "report.json"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "pip install 'medseg-trt[report]'" in caplog.text


@pytest.mark.parametrize(
    ("value", "spec", "scale", "text"),
    [
        (1.2345, ".2f", 1.0, "1.23"),
        (0.98765, ".2f", 100.0, "98.77"),
        (-0.002, "+.4f", 1.0, "−0.0020"),
        (-0.00001, "+.4f", 1.0, "+0.0000"),
        (-0.00001, ".4f", 1.0, "0.0000"),
        (3.4e-6, ".1e", 1.0, "3.4e-06"),
        (7, "d", 1.0, "7"),
    ],
)
def test_formatted_applies_scale_spec_and_typographic_minus(value, spec, scale, text):
    assert formatted(value, spec, scale) == text


def test_missing_figure_is_a_dash_with_a_footnote():
    figures = Figures(data={"a": {"reason": "no <meter>"}, "b": None, "c": {"reason": "no card"}}, markup=True)
    assert [figures.n(path, "d") for path in ("a.deep.er", "b", "c", "a")] == [
        "–<sup>a</sup>",
        "–",
        "–<sup>b</sup>",
        "–<sup>a</sup>",
    ]
    assert figures.notes() == '<ol type="a" class="notes"><li>no &lt;meter&gt;</li><li>no card</li></ol>'
    assert figures.notes() == ""
    with pytest.raises(KeyError):
        figures.n("d", "d")


def test_a_bar_in_a_name_does_not_break_a_table():
    header, _, line = table(("a", "b"), [("x|y", "1")])
    assert line.replace("\\|", "").count("|") == header.count("|")
