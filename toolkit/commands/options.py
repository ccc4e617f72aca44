"""What every command shares: kinds of arguments, ``--json``, ``-q`` and ``-v``, and how results are printed."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import click

from medseg_trt.plain_text import printable, unicode_text

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)

verify_option = click.option(
    "--verify-key",
    type=FILE,
    help="The public key, in PEM, of who built the bundle: an unsigned or changed one is refused.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``, ``-q`` and ``-v``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_quieter, help="Show warnings only."),
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_louder, help="Show details and tracebacks."
        ),
    ):
        command = option(command)
    return command


def _quieter(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.WARNING)


def _louder(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("medseg_trt").setLevel(logging.DEBUG)


def print_result(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Print a command's result: one JSON object, or text; in both, names that are not UTF-8 become valid Unicode."""
    if as_json:
        click.echo(json.dumps(_valid(result), indent=2))
    else:
        click.echo("\n".join(map(printable, text.split("\n"))))


def _valid(value: Any) -> Any:
    """Return plain data whose texts are valid Unicode, which not every reader of JSON forgives."""
    if isinstance(value, str):
        return unicode_text(value)
    if isinstance(value, dict):
        return {_valid(name): _valid(each) for name, each in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in cast("Sequence[Any]", value)]
    return value


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and the others figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")  # no figure is ever cut
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)


def nested_lines(found: dict[str, Any], indent: str = "") -> list[str]:
    """Return nested plain data as indented lines of text."""
    lines: list[str] = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *nested_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {f'{value:,}' if isinstance(value, int) else value}")
    return lines
