"""Every command explains itself, at once: help imports nothing heavy."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from parsing import parse

from medseg_trt.cli import cli
from medseg_trt.commands.help import ExampleCommand, SectionedGroup

HEAVY = {"torch", "onnx", "onnxruntime", "numpy", "pydantic", "PIL", "rich", "scipy", "jaxtyping"}
PROBE = f"""
import sys
from medseg_trt.cli import main
try:
    main()
finally:
    print("heavy:", *sorted(sys.modules.keys() & {HEAVY!r}), file=sys.stderr)
"""


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


ALL = list(commands(cli))


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) or "medseg-trt" for path, _ in ALL])
def test_help_of_every_command_is_there_and_light(path, command):
    done = probe(*path, "--help")
    assert (done.returncode, done.stderr) == (0, "heavy:\n")
    assert done.stdout.startswith("Usage: ")
    assert command.help.splitlines()[0] in " ".join(done.stdout.split())  # help is wrapped to the terminal
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in done.stdout


def listed(command: click.Command) -> list[str]:
    """Return the lines of a command's help on a terminal of 80 columns."""
    return command.get_help(click.Context(command, info_name="medseg-trt", terminal_width=80)).splitlines()


def cut_summaries(group: click.Group) -> list[str]:
    """Return the commands of a group whose summary is not whole and on one line in the group's help."""
    lines = [" ".join(line.split()) for line in listed(group)]
    return [
        name
        for name, command in group.commands.items()
        if f"{name} {command.get_short_help_str(limit=1000)}" not in lines
    ]


@pytest.mark.parametrize(
    "group",
    [command for _, command in ALL if isinstance(command, click.Group)],
    ids=lambda group: group.name,
)
def test_no_summary_is_cut_at_80_columns(group):
    assert cut_summaries(group) == []


@pytest.mark.parametrize(("num_words", "is_cut"), [(12, False), (13, True), (40, True)])
def test_a_summary_that_is_cut_would_be_seen(num_words, is_cut):
    group = SectionedGroup("group")
    group.add_section("Data", [click.Command("completion", help=" ".join(["word"] * num_words) + ".")])
    assert cut_summaries(group) == (["completion"] if is_cut else [])


@pytest.mark.parametrize(
    ("path", "command"),
    [(path, command) for path, command in ALL if not isinstance(command, click.Group)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_has_examples_that_parse(path, command):
    assert isinstance(command, ExampleCommand)
    lines = listed(command)
    below = lines[lines.index("Examples:") + 1 :]
    assert [line.strip() for line in below] == list(command.examples)
    assert command.examples
    for example in command.examples:
        assert len(f"  {example}") <= 80
        assert parse(example).command is command


@pytest.mark.parametrize("example", ["medseg-trt compare a", "medseg-trt build --chkpt a.pt", "medseg-trt get organs"])
def test_parsing_an_invalid_example_is_a_usage_error(example):
    with pytest.raises(click.UsageError):
        parse(example)


def test_help_lists_the_commands_in_the_order_of_work_under_headings():
    lines = listed(cli)
    words = [line.split()[0].removesuffix(":") for line in lines[lines.index("Data:") :] if line]
    assert words == [
        *("Data", "samples", "data"),
        *("Train", "block", "import", "train", "reproduce", "ablate"),
        *("Export", "build", "export", "inspect", "kernels"),
        *("Run", "infer", "serve"),
        *("Measure", "evaluate", "bench", "compare"),
        *("Machine", "doctor", "kit", "completion"),
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_calls_the_installed_command(shell):
    done = probe("completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"_MEDSEG_TRT_COMPLETE={shell}_complete" in done.stdout
    assert " medseg-trt" in done.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [("medseg-trt be", ["bench"]), ("medseg-trt block ex", ["extract"]), ("medseg-trt bench --tier q", ["quick"])],
)
def test_the_shell_completes_commands_options_and_choices(words, completed):
    script = Path(sysconfig.get_path("scripts"), "medseg-trt")
    environment = {
        **os.environ,
        "_MEDSEG_TRT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == completed


def test_main_workflow_commands_exist():
    expected = {
        "samples get",
        "block extract",
        "train",
        "build",
        "infer",
        "evaluate",
        "bench",
        "inspect",
    }
    assert expected <= {" ".join(path) for path, _ in ALL}


def test_the_installed_command_and_the_module_say_the_same():
    script = Path(sysconfig.get_path("scripts"), "medseg-trt")
    by_script, by_module = (
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout.split()
        for command in ([script], [sys.executable, "-m", "medseg_trt"])
    )
    assert by_script[2:] == by_module[by_module.index("[OPTIONS]") :]


def test_help_probe_detects_a_heavy_import():
    done = subprocess.run(
        [sys.executable, "-c", "import numpy\n" + PROBE, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stderr == "heavy: numpy\n"


@pytest.mark.parametrize("arguments", [("no-such-command",), ("infer",), ("inspect", "--classes", "0", "arch:x")])
def test_wrong_usage_exits_with_2_and_no_traceback(arguments):
    done = probe(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr
