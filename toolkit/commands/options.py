"""Shared by the commands: argument types, ``--json``, ``-q`` and ``-v``, and printing of results."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg_trt.commands.json_output import only_json
from medseg_trt.devices import DEVICE_HELP, ComputeDevice, parse_device, require_device
from medseg_trt.errors import UsageError
from medseg_trt.progress import printable

if TYPE_CHECKING:
    from medseg_trt.tiling.windows import TileChoice

STDOUT = "medseg_trt.stdout"  # key of the context's meta: the ``JsonOutput`` of ``print_json``
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)
CELL_FRAME = 3  # characters of a table's cell: a space on either side, and a line
LONGEST_WORD = 40  # characters that are kept in one line of a cell
GROUPED_FROM = 10_000  # integers are written with separators

postprocess_option = click.option(
    "--no-postprocess",
    "postprocess",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Keep the network's raw masks: leave out the steps that the bundle stores.",
)
tta_option = click.option(
    "--tta",
    type=click.Choice(["flips", "rot90"]),
    help="Test-time augmentation: the mean logits of flipped or turned copies of each slice; four times the runs.",
)


def tile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--tile`` and ``--overlap`` to a command."""
    tile = click.option(
        "--tile",
        metavar="auto|N|off",
        help=(
            "Cut images into windows of N pixels or of the network's size (auto), or resize whole slices (off).  "
            "[default: as the network was trained]"
        ),
    )
    overlap = click.option(
        "--overlap",
        type=click.FloatRange(0, 1, max_open=True),
        help="Overlap of windows.  [default: what the network records, and 0.25 with --tile]",
    )
    return tile(overlap(command))


mpp_option = click.option(
    "--mpp",
    type=click.FloatRange(0, min_open=True),
    help="Microns per pixel of 2-D images, at full resolution.  [default: what a TIFF or SVS file says]",
)


def tiles_of(tile: str | None, overlap: float | None, mpp: float | None) -> "TileChoice":
    """Return the windows that ``--tile``, ``--overlap`` and ``--mpp`` ask for; None for ``--tile off``.

    Raises:
        UsageError: they are impossible, or there is an overlap of nothing.
    """
    from medseg_trt.tiling.windows import AsRecorded, Tiles

    if tile is None:
        return AsRecorded(overlap=overlap, mpp=mpp)
    if tile == "off":
        if overlap is not None or mpp is not None:
            raise UsageError("--tile off cuts no windows; leave out --overlap and --mpp")
        return None
    try:
        given = {} if overlap is None else {"overlap": overlap}
        return Tiles(size=None if tile == "auto" else int(tile), mpp=mpp, **given)
    except ValueError as error:
        raise UsageError(
            f"--tile {tile}: give auto or a number of pixels from 1, for example --tile 512, or off"
        ) from error


verify_option = click.option(
    "--verify-key",
    type=FILE,
    help="The signer's public key (PEM). Unsigned, changed or differently signed bundles are refused.",
)


device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help=f"Where to compute: {DEVICE_HELP}"
)


def device_of(text: str, *, pytorch: bool = False) -> ComputeDevice:
    """Read ``--device`` and refuse a GPU that is not there, before anything else is done; see ``require_device``.

    Raises:
        UsageError: it names no device.
        DeviceError: the GPU is not there, or with ``pytorch`` PyTorch is built without CUDA.
    """
    device = parse_device(text)
    require_device(device, pytorch=pytorch)
    return device


def completed(names: Callable[[], Iterable[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return what completes an option's value in a shell; ``names`` is called only then."""

    def complete(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
        return [name for name in names() if name.startswith(begun)]

    return complete


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
        print_text(text)


def print_text(text: str, *, err: bool = False) -> None:
    """Print lines of text, which may hold names from files, without control characters."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: text in the first column, numbers in the others.

    Cells may hold names from files, so nothing in them is read as Rich's markup and control characters are escaped.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    columns = [[printable(row[index]) for row in rows] for index in range(len(header))]
    headings = [[printable(line) for line in name.split("\n")] for name in header]  # a name may have several lines
    widths = _column_widths([[*lines, *cells] for lines, cells in zip(headings, columns, strict=True)], console.width)
    table = Table()
    for index, (lines, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(
            Text("\n".join(lines)), justify="right" if index else "left", overflow="fold", min_width=width, width=width
        )
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))
    console.width = max(console.width, sum(widths) + CELL_FRAME * len(widths) + 1)
    console.print("\n".join(map(printable, title.split("\n"))), markup=False, soft_wrap=True)
    console.print(table)


def _column_widths(columns: Sequence[Sequence[str]], available: int) -> list[int]:
    """Return the widths in which a table fits ``available`` characters, unless a word would have to be broken."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, cells), default=0) for cells in columns]
    words = [[cell_len(word) for cell in cells for word in cell.split()] for cells in columns]
    least = [min(max(lengths, default=0), LONGEST_WORD) for lengths in words]
    while sum(widths) + CELL_FRAME * len(widths) + 1 > available:
        slack = [width - smallest for width, smallest in zip(widths, least, strict=True)]
        if max(slack, default=0) <= 0:
            break
        widths[slack.index(max(slack))] -= 1
    return widths


def nested_lines(data: dict[str, Any], indent: str = "") -> list[str]:
    """Format nested data as indented lines, without the fields that are not set."""
    lines: list[str] = []
    for name, value in data.items():
        if isinstance(value, dict):
            inside = nested_lines(value, indent + "  ")
            lines += [f"{indent}{name}:", *inside] if inside else []
        elif value not in (None, "", (), []):
            lines.append(f"{indent}{name}: {_shown(name, value)}")
    return lines


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_count = isinstance(value, int) and value >= GROUPED_FROM and not name.endswith("seed")
    return f"{value:,}" if is_count else str(value)
