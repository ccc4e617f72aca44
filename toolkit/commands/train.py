"""``medseg-trt train``: train a model."""

import json
from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.interrupts import resumable
from medseg_trt.commands.options import FILE, FOLDER, completed, device_of, device_option, output_options, print_result
from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG, is_main_process
from medseg_trt.spec import to_dict


def _recipes() -> list[str]:
    from medseg_trt.train.recipes.recipes import RECIPES

    return list(RECIPES)


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt train --recipe folder --data mydata -o run",
        "medseg-trt train --recipe organs-demo --data organs --block block.safetensors",
        "medseg-trt train --recipe busi --data Dataset_BUSI --weights R50+ViT-B_16.npz",
        "medseg-trt train --resume --data mydata -o run",
    ),
)
@click.option(
    "--recipe",
    "recipe_name",
    shell_complete=completed(_recipes),
    help="folder (your own images), isic2017, busi, clinicdb, colondb, synapse, acdc, "
    "swin-unet-synapse, ds-transunet-polyps, organs-demo, tumours-demo or cells-demo.",
)
@click.option(
    "--data",
    "data_folder",
    type=FOLDER,
    required=True,
    help="An unpacked archive, or a folder with images/ and masks/.",
)
@click.option("--split-manifest", type=FILE, help="The data.json of another run: use its splits.")
@click.option("--block", "block_file", type=FILE, help="The frozen block, from 'medseg-trt block extract'.")
@click.option(
    "--weights",
    type=FILE,
    multiple=True,
    help="Initial weights of the encoder: R50+ViT-B_16.npz, Swin-T's .pth, or timm's .safetensors; repeatable.",
)
@click.option("-o", "--output", type=FOLDER, help="The run folder.  [default: runs/RECIPE]")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field of the recipe, e.g. train.epochs=5; repeatable.",
)
@click.option("--resume", is_flag=True, help="Resume the run in -o; without --recipe, with its own recipe.")
@device_option
@output_options
def train(
    recipe_name: str | None,
    data_folder: Path,
    split_manifest: Path | None,
    block_file: Path | None,
    weights: tuple[Path, ...],
    output: Path | None,
    changes: tuple[str, ...],
    resume: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train a model on images and masks.

    Several processes share every batch: torchrun --nproc-per-node 4 -m medseg_trt train …
    """
    computes_on = device_of(device, pytorch=True)
    from medseg_trt.train.datasets.official import open_dataset
    from medseg_trt.train.loop import train as run_training
    from medseg_trt.train.recipes.recipes import recipe, recorded_recipe
    from medseg_trt.train.runs import finished_epochs

    splits = (f"data.manifest={split_manifest.resolve()}",) if split_manifest is not None else ()
    start = ("pretrained=file",) if weights else ()
    given = (*start, *changes, *splits)
    if recipe_name is None:
        if not resume or output is None or given:
            raise UsageError(
                "name a recipe: --recipe folder (your own images), isic2017, busi …; to go on with a run and its own "
                "recipe: --resume -o DIR, without --set, --weights and --split-manifest"
            )
        out, chosen = output, recorded_recipe(output)
    else:
        out, chosen = output or Path("runs", recipe_name), recipe(recipe_name, given)
        LOG.info("the recipe is %s%s", recipe_name, f" with {', '.join(changes)}" if changes else "")
    LOG.debug("%s", json.dumps(to_dict(chosen), indent=2))
    data = open_dataset(None, data_folder, chosen.data)
    with resumable("--resume", lambda: finished_epochs(out)):
        best = run_training(chosen, data, out, block=block_file, weights=weights, resume=resume, device=computes_on)
    if not is_main_process():
        return
    last_row = json.loads((out / "history.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    result = {"checkpoint": str(best), "last": str(out / "last.pt"), "curve": str(out / "curve.png"), "final": last_row}
    print_result(as_json, result, f"best checkpoint: {best}\ncurve: {out / 'curve.png'}")
