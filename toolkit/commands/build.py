"""``medseg-trt build``: export a checkpoint to a bundle."""

import logging
from pathlib import Path
from typing import Literal, Unpack

import click

from medseg_trt.commands.engine_options import EngineFields, engine_options, engine_spec
from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import (
    FILE,
    FOLDER,
    device_of,
    device_option,
    output_options,
    print_json,
    print_table,
    print_text,
)
from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG
from medseg_trt.spec import LIBRARY_NAMES


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt build --ckpt run/best.pt",
        "medseg-trt build --ckpt run/best.pt --data data/organs --precision fp32,int8",
        "medseg-trt build --ckpt run/best.pt --data data/organs --block auto",
        "medseg-trt build --ckpt run/best.pt --precision vit=int8,block=w4a16",
        "medseg-trt build --ckpt run/best.pt --precision fp16 --target sm86,sm89,sm120",
        "medseg-trt build --ckpt run/best.pt --sign sign.pem -o model.medseg",
        "medseg-trt build --onnx net.onnx --preprocessing net.json --data data/organs",
    ),
)
@click.option("--ckpt", "checkpoint", type=FILE, help="A checkpoint written by 'train' or 'import'.")
@click.option("--onnx", "onnx_file", type=FILE, help="Instead of a checkpoint: a network from elsewhere in ONNX.")
@click.option(
    "--preprocessing",
    "description_file",
    type=FILE,
    help='With --onnx: JSON such as {"preprocessing": {"image_size": [256, 256], "window": [0, 255]}, '
    '"classes": {"names": ["background", "lesion"]}}.',
)
@click.option(
    "-o", "--output", type=FOLDER, help="The bundle folder to write.  [default: the checkpoint's name with .medseg]"
)
@click.option(
    "--data",
    "data_folder",
    type=FOLDER,
    help="Images for verification, accuracy gate and calibration.  [default: the training data folder]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("fp32",),
    show_default=True,
    help="fp32, bf16, fp16, int8, fp8, w8a16 or w4a16; int8+fp16 computes the float parts of int8 in fp16. Several are "
    "comma-separated. A precision for each part: vit=int8,block=w8a16.",
)
@click.option(
    "--block",
    default="exact",
    show_default=True,
    help="The language block in the graphs: exact; affine, one matrix; narrow:r=512,k=1024,heads=4, a smaller layer; "
    "or auto, the cheapest that passes the error on held-out tokens and the accuracy gate.",
)
@click.option(
    "--max-dice-drop",
    type=click.FloatRange(0, 1),
    default=0.005,
    show_default=True,
    help="Accuracy gate for reduced precision: largest drop of the mean Dice, at the upper end of its interval.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="The back-end to try; auto tries all. tensorrt-rtx or tensorrt: the library that builds engines.",
)
@click.option("--target", "targets", multiple=True, help="Build engines for these GPUs, e.g. sm86,sm89,sm120.")
@engine_options
@click.option(
    "--outputs",
    type=click.Choice(["logits", "mask"]),
    default="logits",
    show_default=True,
    help="mask: the graphs also compute masks at the size of the input image.",
)
@click.option(
    "--sign",
    "sign_key",
    type=FILE,
    help="Sign the bundle with this Ed25519 private key (PEM): openssl genpkey -algorithm ed25519 -out sign.pem.",
)
@device_option
@output_options
def build(
    checkpoint: Path | None,
    onnx_file: Path | None,
    description_file: Path | None,
    output: Path | None,
    data_folder: Path | None,
    precisions: tuple[str, ...],
    block: str,
    max_dice_drop: float,
    backend: str,
    targets: tuple[str, ...],
    outputs: Literal["logits", "mask"],
    sign_key: Path | None,
    device: str,
    as_json: bool,
    **engine_fields: Unpack[EngineFields],
) -> None:
    """Export a checkpoint, or an ONNX file, to a verified bundle.

    Every graph is compared with PyTorch, or with the ONNX file as it is, before it is written. Reduced precisions must
    pass the accuracy gate, else the exit code is 3 and an existing bundle stays unchanged.
    """
    computes_on = device_of(device, pytorch=checkpoint is not None)
    from medseg_trt import pipeline
    from medseg_trt.bundles.tables import choice, engine_table, execution_table
    from medseg_trt.sessions.backends import NO_BF16
    from medseg_trt.spec import BuildSpec, split_precisions

    try:
        spec = BuildSpec(
            precisions=split_precisions(precisions),
            max_dice_drop=max_dice_drop,
            block=block,
            outputs=outputs,
            backend="auto" if backend in LIBRARY_NAMES else backend,
            engines=engine_spec(backend, targets, engine_fields, computes_on.number),
        )
    except ValueError as error:
        raise UsageError(f"--precision {','.join(precisions)}: {error}") from error
    if onnx_file is not None and description_file is not None and checkpoint is None:
        bundle = pipeline.build_onnx(onnx_file, description_file, spec, output, data_folder, sign_key, computes_on)
    elif checkpoint is not None and onnx_file is None and description_file is None:
        bundle = pipeline.build(checkpoint, spec, output, data_folder, sign_key, computes_on)
    else:
        raise UsageError("give --ckpt FILE, or --onnx FILE with --preprocessing FILE")
    if as_json:
        print_json({"bundle": str(bundle.folder), "manifest": bundle.manifest()})
        return
    print_table(f"{bundle.folder}; infer uses the first row", *execution_table(bundle))
    if bundle.content.engines:
        print_table("engines; of those not executed, masks were verified with the graphs above", *engine_table(bundle))
    print_text(choice(bundle))
    if bundle.postprocessing is not None:
        print_table(f"post-processing, chosen on {bundle.postprocessing.description}", *bundle.postprocessing.table())
    if bundle.content.block is not None and bundle.content.block.requested != "exact":
        print_table(f"the language block: {bundle.content.block.rung}", *bundle.content.block.table())
    asked = "bf16" in spec.precisions or LOG.isEnabledFor(logging.DEBUG)  # a build tries bf16 unasked
    for line in bundle.content.rejected_executions:
        if asked or not line.endswith(NO_BF16):
            print_text(f"not used: {line}")
