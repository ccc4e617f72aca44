"""With ``--json`` stdout is one JSON object, whoever else writes to it."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from medseg_trt.cli import cli

COMMANDS = Path(__file__).parents[2] / "toolkit" / "commands"
NOISE = """
import os, subprocess, sys
def noise():
    print("a print")
    os.write(1, b"a library in C++\\n")
    subprocess.run([sys.executable, "-c", "print('a child process')"], check=True)
"""
WRITERS = {"a print", "a library in C++", "a child process"}


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NOISE + code], capture_output=True, text=True, check=True)


def test_only_json_redirects_other_output_to_stderr_and_restores_stdout():
    done = ran(
        "from medseg_trt.commands.json_output import only_json\n"
        "with only_json() as output:\n    noise()\n    output.print({'a': [1]})\n    noise()\n"
        "print('afterwards')"
    )
    result, rest = json.JSONDecoder().raw_decode(done.stdout)
    assert result == {"a": [1]}
    assert done.stdout[rest:].split() == ["afterwards"]
    assert done.stderr.splitlines().count("a library in C++") == 2
    assert set(done.stderr.splitlines()) == WRITERS


def test_an_error_gives_stdout_back():
    done = ran(
        "from medseg_trt.commands.json_output import only_json\n"
        "try:\n    with only_json():\n        raise ValueError\nexcept ValueError:\n    noise()\n"
    )
    assert set(done.stdout.splitlines()) == WRITERS


@pytest.mark.parametrize("wanted", [True, False])
def test_a_command_prints_one_object_and_nothing_else(wanted):
    done = ran(
        "from medseg_trt import doctor\n"
        "from medseg_trt.cli import cli\n"
        "doctor.examine = lambda: noise() or []\n"
        f"cli({['doctor', '--json'] if wanted else ['doctor']})"
    )
    if wanted:
        assert json.loads(done.stdout) == {"abilities": []}
    assert set((done.stderr if wanted else done.stdout).splitlines()) >= WRITERS


def commands(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield from commands(command) if isinstance(command, click.Group) else [command]


def test_every_command_with_json_keeps_stdout_for_it():
    with_json = [command for command in commands(cli) if any("--json" in option.opts for option in command.params)]
    assert len(with_json) >= 14
    assert [command.name for command in with_json if not hasattr(command.callback, "__wrapped__")] == []


@pytest.mark.parametrize("path", sorted(COMMANDS.glob("*.py")), ids=lambda path: path.stem)
def test_no_command_writes_json_by_itself(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printing = [call for call in calls if ast.unparse(call.func) in ("click.echo", "print")]
    assert [ast.unparse(call) for call in printing if "json." in ast.unparse(call)] == []
