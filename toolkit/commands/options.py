"""Shared by the commands: argument types, ``--json``, ``-q`` and ``-v``, and printing of results."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import click

from medseg_trt.commands.json_output import only_json
from medseg_trt.progress import printable

STDOUT = "medseg_trt.stdout"  # key of the context's meta: the ``JsonOutput`` of ``print_json``
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)

verify_option = click.option(
    "--verify-key",
    type=FILE,
    help="The signer's public key (PEM). Unsigned, changed or differently signed bundles are refused.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``, ``-q`` and ``-v`` to a command; with ``--json``, stdout is reserved for ``print_json``."""

    @wraps(command)
    def run(**arguments: Any) -> Any:
        with only_json() if arguments["as_json"] else nullcontext() as stdout:
            click.get_current_context().meta[STDOUT] = stdout
            return command(**arguments)

    with_options: Callable[..., Any] = run
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_quieter, help="Show warnings only."),
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_louder, help="Show details and tracebacks."
        ),
    ):
        with_options = option(with_options)
    return with_options


def _quieter(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.WARNING)


def _louder(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.DEBUG)


def print_json(result: dict[str, Any]) -> None:
    """Print a command's result as one JSON object, the only thing on its stdout."""
    click.get_current_context().meta[STDOUT].print(result)


def print_result(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Print the result of a command: one JSON object, or text without control characters."""
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(map(printable, text.split("\n"))))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: text in the first column, numbers in the others."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")  # numbers are never cut
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)


def nested_lines(data: dict[str, Any], indent: str = "") -> list[str]:
    """Format nested data as indented lines."""
    lines: list[str] = []
    for name, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *nested_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {f'{value:,}' if isinstance(value, int) else value}")
    return lines
