"""``medseg-trt evaluate``: compare networks with the masks."""

from pathlib import Path

import click

from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_table, verify_option
from medseg_trt.errors import UsageError


@click.command()
@click.option("--ckpt", "checkpoints", type=FILE, multiple=True, help="A checkpoint; may be given several times.")
@click.option("--bundle", "bundles", type=FOLDER, multiple=True, help="A bundle; may be given several times.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="An unpacked archive, or images/ and masks/.")
@click.option(
    "--split", "splits", multiple=True, default=("val",), show_default=True, help="May be given several times."
)
@click.option("--backend", default="auto", show_default=True, help="What runs the bundles.")
@click.option(
    "--metric",
    default="volume",
    show_default=True,
    help="How to count: volume, per_image, unext_batch, volume_transunet.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Slices at once; unext_batch depends on it."
)
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Read the data otherwise, e.g. data.dataset=colondb."
)
@click.option("--hd95", is_flag=True, help="Also the 95th percentile of the distance between the outlines.")
@verify_option
@output_options
def evaluate(
    checkpoints: tuple[Path, ...],
    bundles: tuple[Path, ...],
    data_folder: Path,
    splits: tuple[str, ...],
    backend: str,
    metric: str,
    batch: int,
    hd95: bool,
    changes: tuple[str, ...],
    verify_key: Path | None,
    as_json: bool,
) -> None:
    """Compare checkpoints and bundles with the masks: Dice, IoU and HD95 per class."""
    from medseg_trt import scoreboard

    if not checkpoints and not bundles:
        raise UsageError("nothing to evaluate; give --ckpt model.pt or --bundle model.medseg")
    boards = scoreboard.evaluate_all(
        checkpoints, bundles, data_folder, splits, backend, hd95,
        metric=metric, batch=batch, changes=changes, verify_key=verify_key,
    )  # fmt: skip
    if as_json:
        print_json({"splits": [board.to_dict() for board in boards]})
    else:
        for board in boards:
            print_table(board.heading(), board.header(), board.cells())
            print_table("How often each class was found:", *board.branches())
