"""``medseg-trt samples``: real images, masks and weights."""

from pathlib import Path

import click

from medseg_trt.commands.options import FOLDER, output_options, print_result


@click.group()
def samples() -> None:
    """Real images, masks and weights to try things with."""


@samples.command("get")
@click.argument("names", nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, default=Path("samples"), show_default=True, help="Where to put them.")
@output_options
def samples_get(names: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Fetch samples by NAME: organs, tumours, cells, llama-block."""
    from medseg_trt.samples.catalogue import get

    folders = get(names, output)
    print_result(as_json, {"folders": [str(folder) for folder in folders]}, "\n".join(map(str, folders)))
