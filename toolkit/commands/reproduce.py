"""``medseg-trt reproduce``: a table of the paper."""

import json
from pathlib import Path

import click

from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json
from medseg_trt.progress import is_spokesman


@click.command()
@click.argument("table")
@click.option("--data", "root", type=FOLDER, required=True, help="The folder with the unzipped archives.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Trainings of every split.")
@click.option(
    "--splits", type=click.IntRange(1), default=5, show_default=True, help="Of BUSI, ClinicDB, ColonDB: not divided."
)
@click.option("--block", "block_file", type=FILE, help="The frozen block, from 'medseg-trt block extract'.")
@click.option("--weights", type=FILE, help="What the encoders start from: R50+ViT-B_16.npz.")
@click.option("-o", "--output", type=FOLDER, help="Where the runs and the table go.  [default: reproduced/TABLE]")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field of all recipes, e.g. train.epochs=5."
)
@output_options
def reproduce(
    table: str, root: Path, seeds: int, splits: int, block_file: Path | None, weights: Path | None,
    output: Path | None, changes: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Train and test what TABLE, table1 or table2, needs, and lay our figures beside the paper's.

    What is finished is kept: type the same command again after an interrupt.
    """
    from medseg_trt.reproduce.reproduce import Wanted
    from medseg_trt.reproduce.reproduce import reproduce as run_what_is_missing

    wanted = Wanted(
        table=table, root=root, out=output or Path("reproduced", table), seeds=seeds, splits=splits, changes=changes,
        block=block_file, weights=weights,
    )  # fmt: skip
    path = run_what_is_missing(wanted)
    if is_spokesman():
        text = path.read_text(encoding="utf-8")
        if as_json:
            print_json({"table": str(path), **json.loads(text)})
        else:
            click.echo(_markdown(path))


def _markdown(path: Path) -> str:
    beside = path.with_suffix(".md")
    return f"{beside.read_text(encoding='utf-8')}\ntable: {beside}"
