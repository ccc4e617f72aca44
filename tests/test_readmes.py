"""What the READMEs say can be done: links lead somewhere, commands parse, and the Python of the README runs."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from parsing import parse
from tiny import make_checkpoint, write_pictures

ROOT = Path(__file__).parents[1]
MAX_LINES = 150  # of README.md: read in five minutes
LISTED = subprocess.run(["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
READMES = sorted(path for path in LISTED.stdout.split() if not path.startswith("tests/"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def commands(text: str) -> Iterator[str]:
    """Yield the lines of shell blocks that start with medseg-trt, without comments and with their continuations."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.startswith("medseg-trt "))


def dead_links(path: Path) -> list[str]:
    """Find the relative links of a file, or their anchors, that lead nowhere."""
    dead: list[str] = []
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(f"{target}#{anchor}" if anchor else target)
    return dead


def anchors(path: Path) -> set[str]:
    """Make the anchors of a file's headings as renderers of Markdown do."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", [*READMES, "CHANGELOG.md"])
def test_every_link_leads_somewhere(name):
    assert dead_links(ROOT / name) == []


def test_a_dead_link_and_a_dead_anchor_would_be_seen(tmp_path):
    (tmp_path / "a.md").write_text("# A title\n[a](b.md) [b](a.md#a-title) [c](#no) [d](https://b.c)", encoding="utf-8")
    assert dead_links(tmp_path / "a.md") == ["b.md", "#no"]


@pytest.mark.parametrize("name", READMES)
def test_every_command_of_a_readme_parses(name):
    for command in commands((ROOT / name).read_text(encoding="utf-8")):
        assert isinstance(parse(command).command, click.Command)


def test_readme_shows_the_commands_from_samples_to_bench_in_order():
    shown = [command.split()[1] for command in commands((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert shown[:6] == ["samples", "block", "train", "build", "infer", "bench"]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (python,) = [
        block for language, block in FENCE.findall((ROOT / "README.md").read_text("utf-8")) if language == "python"
    ]
    make_checkpoint(tmp_path / "run").rename(tmp_path / "run" / "best.pt")
    write_pictures(tmp_path / "data", count=2)
    (tmp_path / "data" / "images").rename(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(python, names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "images/case0.png",
        "images/case1.png",
    ]
    assert {"bundle", "logits", "model"} <= names.keys()
