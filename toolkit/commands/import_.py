"""``medseg-trt import``: convert a checkpoint of the authors' code."""

import re
from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FILE, output_options, print_result
from medseg_trt.errors import UsageError


@click.command(
    "import",
    cls=ExampleCommand,
    examples=(
        "medseg-trt import epoch_149.pth -o model.pt",
        "medseg-trt import busi.pth --recipe busi --classes background,lesion",
    ),
)
@click.argument("source", type=FILE)
@click.option("-o", "--output", type=FILE, default=Path("model.pt"), show_default=True, help="The file to write.")
@click.option("--classes", help="The class names, comma-separated, background first.")
@click.option("--image-size", help="In pixels: 224, or HEIGHTxWIDTH.  [default: the training size, or the recipe's]")
@click.option("--block", "block_file", type=FILE, help="The frozen block, if the checkpoint does not contain it.")
@click.option(
    "--recipe",
    default="synapse",
    show_default=True,
    help="The recipe whose preprocessing the network was trained with.",
)
@click.option(
    "--architecture", help="The architecture, if it has other sizes than the published one that the weights are of."
)
@click.option("--drop-auxiliary", is_flag=True, help="Leave out DS-TransUNet's auxiliary heads, which only train.")
@output_options
def import_(
    source: Path,
    output: Path,
    classes: str | None,
    image_size: str | None,
    block_file: Path | None,
    recipe: str,
    architecture: str | None,
    drop_auxiliary: bool,
    as_json: bool,
) -> None:
    """Convert a checkpoint of the authors' code.

    SOURCE is a .pth file of Beckschen/TransUNet, LLM4MedSeg, Swin-Unet, DS-TransUNet, or U-Net (LeeJunHyun's,
    Nest-of-Unets', milesial's). The converted network computes the same logits.
    """
    from medseg_trt.spec import Classes, to_dict
    from medseg_trt.train.official_weights import import_official
    from medseg_trt.train.recipes.recipes import recipe as named_recipe

    try:
        names = Classes(names=tuple(name.strip() for name in classes.split(","))) if classes is not None else None
    except ValueError as error:
        raise UsageError(f"--classes: {error}") from error
    checkpoint = import_official(
        source,
        output,
        preprocessing=named_recipe(recipe).contract,
        classes=names,
        image_size=_size(image_size),
        block=block_file,
        architecture=architecture,
        keep_auxiliary=not drop_auxiliary,
    )
    spec = checkpoint.spec
    result = {
        "file": str(output),
        "architecture": spec.architecture,
        "image_size": list(spec.image_size),
        "classes": list(checkpoint.classes.names),
        "preprocessing": to_dict(checkpoint.preprocessing),
        "block_sha256": checkpoint.block_sha256,
    }
    size = " x ".join(map(str, spec.image_size))
    print_result(
        as_json,
        result,
        f"{output}: {spec.architecture}, {size} pixels, {len(checkpoint.classes.names)} classes; "
        f"images are prepared as the recipe {recipe} does it",
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        raise UsageError(f"--image-size {text}: give pixels, such as 224, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])
