"""Every command explains itself, at once: help imports nothing heavy."""

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from medseg_trt.cli import cli

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


def test_every_command_of_the_way_through_is_there():
    expected = {
        "samples get", "block extract", "train", "build", "infer", "evaluate", "bench", "inspect",
    }  # fmt: skip
    assert expected <= {" ".join(path) for path, _ in ALL}


def test_the_installed_command_and_the_module_say_the_same():
    script = Path(sysconfig.get_path("scripts"), "medseg-trt")
    by_script, by_module = (
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout.split()
        for command in ([script], [sys.executable, "-m", "medseg_trt"])
    )
    assert by_script[2:] == by_module[by_module.index("[OPTIONS]") :]


def test_a_heavy_import_would_be_seen():
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
