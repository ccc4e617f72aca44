"""``medseg-trt samples``: download sample data."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FOLDER, output_options, print_result


@click.group()
def samples() -> None:
    """Download sample images, masks and weights."""


@samples.command(
    "get",
    cls=ExampleCommand,
    examples=(
        "medseg-trt samples get organs llama-block -o data",
        "medseg-trt samples get tumours cells -o data",
    ),
)
@click.argument("names", nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, default=Path("samples"), show_default=True, help="The folder to write to.")
@output_options
def samples_get(names: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Download samples by name: organs, tumours, cells, llama-block."""
    from medseg_trt.samples.catalogue import get

    folders = get(names, output)
    print_result(as_json, {"folders": [str(folder) for folder in folders]}, "\n".join(map(str, folders)))
