"""Tables on the terminal show names from files as they are: no markup, no control characters."""

from pathlib import Path

import pytest

from medseg_trt.commands.options import print_table, print_text

COMMANDS = Path(__file__).parents[2] / "toolkit" / "commands"


@pytest.mark.parametrize("name", ["[/x]", "[bold]liver", "[link=http://x]y[/link]", "a[0]"])
def test_print_table_does_not_interpret_markup_in_names(name, capsys):
    """Rich raises MarkupError for a closing tag, and swallows a known opening one."""
    print_table(f"{name}\nsecond line", [name, f"{name}\nthird line"], [[name, name]])
    shown = capsys.readouterr().out
    assert shown.count(name) == 5
    assert "\nsecond line\n" in shown
    assert "third line" in shown


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys):
    print_table("a\x1b[2Jb", ["h\x07", "h"], [["c\rd", "e\nf"]])
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\r")
    for text in (r"a\x1b[2Jb", r"h\x07", r"c\rd", r"e\nf"):
        assert text in shown


def test_lines_of_a_result_hold_no_control_characters(capsys):
    print_text("one\x1b[2J\ntwo\r")
    assert capsys.readouterr().out == "one\\x1b[2J\ntwo\\r\n"


@pytest.mark.parametrize("path", sorted(COMMANDS.glob("*.py")), ids=lambda path: path.stem)
def test_commands_print_text_through_one_function(path):
    text = path.read_text(encoding="utf-8")
    prints = [line.strip() for line in text.splitlines() if "click.echo(" in line and "printable" not in line]
    assert prints == []


def test_no_word_is_broken_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    row = ["int8 (plain)", "onnxruntime", "fp32", "19.19", "99.92 %", "0.6709", "23.5"]
    print_table("title", ["precision", "back-end", "compute", "ms", "agreement", "Dice drop <", "MB"], [row])
    shown = capsys.readouterr().out
    for word in (*row[1:4], "agreement", "precision", "99.92", "(plain)"):
        assert word in shown
