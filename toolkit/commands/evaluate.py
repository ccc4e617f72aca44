"""``medseg-trt evaluate``: score networks on labelled images."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import (
    FILE,
    FOLDER,
    device_of,
    device_option,
    mpp_option,
    output_options,
    postprocess_option,
    print_json,
    print_table,
    print_text,
    tile_options,
    tiles_of,
    tta_option,
    verify_option,
)
from medseg_trt.errors import UsageError


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt evaluate --ckpt run/best.pt --data data/organs --split test",
        "medseg-trt evaluate --bundle model.medseg --data data/organs --hd95",
        "medseg-trt evaluate --ckpt run/best.pt --data mydata --metric unext_batch",
        "medseg-trt evaluate --bundle model.medseg --data data/organs --no-postprocess",
        "medseg-trt evaluate --ckpt a.pt --ckpt b.pt --data mydata --ensemble",
        "medseg-trt evaluate --bundle model.medseg --data mydata --tile auto --mpp 0.25",
    ),
)
@click.option("--ckpt", "checkpoints", type=FILE, multiple=True, help="A checkpoint; repeatable.")
@click.option("--bundle", "bundles", type=FOLDER, multiple=True, help="A bundle; repeatable.")
@click.option(
    "--data",
    "data_folder",
    type=FOLDER,
    required=True,
    help="An unpacked archive, or a folder with images/ and masks/.",
)
@click.option(
    "--split", "splits", multiple=True, default=("val",), show_default=True, help="train, val or test; repeatable."
)
@click.option("--backend", default="auto", show_default=True, help="The back-end that runs the bundles.")
@click.option(
    "--metric",
    default="volume",
    show_default=True,
    help="The metric protocol: volume, per_image, unext_batch or volume_transunet.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Slices per batch; changes the result of unext_batch.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change how the data is read, e.g. data.dataset=colondb.",
)
@click.option("--ensemble", is_flag=True, help="Also score all networks as one: the mean of their logits.")
@postprocess_option
@tta_option
@tile_options
@mpp_option
@click.option("--hd95", is_flag=True, help="Also compute the 95th percentile of the Hausdorff distance.")
@device_option
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
    ensemble: bool,
    postprocess: bool,
    tta: str | None,
    tile: str | None,
    overlap: float | None,
    mpp: float | None,
    hd95: bool,
    changes: tuple[str, ...],
    device: str,
    verify_key: Path | None,
    as_json: bool,
) -> None:
    """Score networks on labelled images: Dice, IoU and HD95."""
    if not checkpoints and not bundles:
        raise UsageError("nothing to evaluate; give --ckpt model.pt or --bundle model.medseg")
    computes_on = device_of(device, pytorch=bool(checkpoints))
    from medseg_trt import evaluate as evaluation

    boards = evaluation.evaluate_all(
        checkpoints,
        bundles,
        data_folder,
        splits,
        backend,
        hd95,
        metric=metric,
        batch=batch,
        changes=changes,
        verify_key=verify_key,
        ensemble=ensemble,
        postprocess=postprocess,
        tta=tta,
        tiles=tiles_of(tile, overlap, mpp),
        device=computes_on,
    )
    if as_json:
        print_json({"splits": [board.to_dict() for board in boards]})
    else:
        for board in boards:
            print_table(board.heading(), board.header(), board.cells())
            print_table("How often each class was predicted:", *board.branches())
            if board.costs:
                print_text("\n".join(board.cost_lines()))
