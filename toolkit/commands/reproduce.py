"""``medseg-trt reproduce``: reproduce a table of the paper."""

import json
from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_text
from medseg_trt.progress import is_main_process


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt reproduce table1 --data archives --block block.safetensors",
        "medseg-trt reproduce table2 --data archives --seeds 1 --set train.epochs=5",
        "medseg-trt reproduce table1 --data archives --models unet,unet-t",
    ),
)
@click.argument("table")
@click.option("--data", "root", type=FOLDER, required=True, help="The folder of the unpacked archives.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training runs for each split.")
@click.option(
    "--splits",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Splits of BUSI, ClinicDB and ColonDB, which have no official split.",
)
@click.option("--block", "block_file", type=FILE, help="The frozen block, from 'medseg-trt block extract'.")
@click.option(
    "--models", help="The networks, comma-separated: unet,swin-unet,transunet,llm-transunet.  [default: the last two]"
)
@click.option(
    "--weights",
    "weights",
    multiple=True,
    metavar="[MODEL=]FILE",
    help="Initial weights of an encoder; without MODEL, of TransUNet: R50+ViT-B_16.npz. Repeatable.",
)
@click.option("-o", "--output", type=FOLDER, help="The folder for the runs and the table.  [default: reproduced/TABLE]")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field of all recipes, e.g. train.epochs=5."
)
@output_options
def reproduce(
    table: str,
    root: Path,
    seeds: int,
    splits: int,
    block_file: Path | None,
    models: str | None,
    weights: tuple[str, ...],
    output: Path | None,
    changes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Reproduce table1 or table2 of the paper.

    Trains and tests every network of TABLE and writes the results beside the paper's. After an interrupt, run the same
    command again: finished runs are kept.
    """
    from medseg_trt.reproduce.reproduce import ReproduceRequest, reproduce_table

    named = [_named_file(text) for text in weights]
    request = ReproduceRequest(
        table=table,
        root=root,
        out=output or Path("reproduced", table),
        seeds=seeds,
        splits=splits,
        changes=changes,
        block=block_file,
        weights=tuple(file for name, file in named if not name),
        models=tuple(name.strip() for name in models.split(",")) if models is not None else (),
        weights_of={name: tuple(file for other, file in named if other == name) for name, _ in named if name},
    )
    path = reproduce_table(request)
    if is_main_process():
        text = path.read_text(encoding="utf-8")
        if as_json:
            print_json({"table": str(path), **json.loads(text)})
        else:
            print_text(_markdown(path))


def _named_file(text: str) -> tuple[str, Path]:
    """Return the network, or "", and the file of ``MODEL=FILE`` or ``FILE``."""
    name, equals, file = text.partition("=")
    return (name, Path(file)) if equals and not Path(text).is_file() else ("", Path(text))


def _markdown(path: Path) -> str:
    beside = path.with_suffix(".md")
    return f"{beside.read_text(encoding='utf-8')}\ntable: {beside}"
