"""``medseg-trt ablate``: find out whether the language block helps, and what of it."""

import json
from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_text


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt ablate --recipe organs-demo --data organs --block block.safetensors",
        "medseg-trt ablate --recipe folder --data mydata --configurations none,mlp",
        "medseg-trt ablate --recipe busi --data Dataset_BUSI --splits 5",
    ),
)
@click.option("--recipe", "recipe_name", required=True, help="The recipe that all runs share, as for 'train'.")
@click.option("--data", "data_folder", type=FOLDER, required=True, help="The data folder, as for 'train'.")
@click.option("--block", "block_file", type=FILE, help="The frozen block, from 'medseg-trt block extract'.")
@click.option("--weights", type=FILE, multiple=True, help="Initial weights of the encoder, as for 'train'; repeatable.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs for each split.")
@click.option("--splits", type=click.IntRange(1), default=1, show_default=True, help="Splits of data without own ones.")
@click.option(
    "--configurations",
    help="Comma-separated: none, mappers, mlp, affine, random, shuffled, frozen, trainable, rotary, mask, residual, "
    "train-only.  [default: all]",
)
@click.option("-o", "--output", type=FOLDER, help="The folder for runs and results.  [default: ablation/RECIPE]")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of the recipe in all runs; repeatable.",
)
@click.option("--note", default="", help="A sentence that is printed with the results.")
@output_options
def ablate(
    recipe_name: str,
    data_folder: Path,
    block_file: Path | None,
    weights: tuple[Path, ...],
    seeds: int,
    splits: int,
    configurations: str | None,
    output: Path | None,
    changes: tuple[str, ...],
    note: str,
    as_json: bool,
) -> None:
    """Train variants of the language block alike and compare them.

    Every configuration starts from the same weights outside the block and sees the same batches. After an interrupt,
    run the same command again: finished runs are kept.
    """
    from medseg_trt.ablate.ablate import AblationRequest
    from medseg_trt.ablate.ablate import ablate as run_ablation
    from medseg_trt.ablate.configurations import CONFIGURATIONS

    request = AblationRequest(
        recipe=recipe_name,
        data=data_folder,
        out=output or Path("ablation", recipe_name),
        block=block_file,
        weights=weights,
        seeds=seeds,
        splits=splits,
        configurations=tuple(configurations.replace(" ", "").split(",")) if configurations else tuple(CONFIGURATIONS),
        changes=(*(("pretrained=file",) if weights else ()), *changes),
        note=note,
    )
    path = run_ablation(request)
    if as_json:
        print_json({"results": str(path), **json.loads(path.read_text(encoding="utf-8"))})
    else:
        print_text(f"{path.with_suffix('.md').read_text(encoding='utf-8')}\n{path.with_suffix('.png')}")
