"""``medseg-trt build``: turn a checkpoint into a bundle."""

from pathlib import Path
from typing import Literal, Unpack

import click

from medseg_trt.commands.engine_options import EngineFields, engine_options, engine_spec
from medseg_trt.commands.options import FILE, FOLDER, output_options, print_json, print_table
from medseg_trt.engines.fingerprint import LIBRARY_NAMES
from medseg_trt.errors import UsageError


@click.command()
@click.option("--ckpt", "checkpoint", type=FILE, required=True, help="A checkpoint that 'train' wrote.")
@click.option("-o", "--output", type=FOLDER, help="The bundle's folder.  [default: the checkpoint's name with .medseg]")
@click.option(
    "--data", "data_folder", type=FOLDER,
    help="Images to verify, judge and calibrate on.  [default: the folder it was trained on]",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, default=("fp32",), show_default=True,
    help="fp32, bf16, fp16, int8, fp8, w8a16, w4a16; int8+fp16: fp16 for what int8 leaves in float; several with "
    "commas, or a mix such as vit=int8,block=w8a16.",
)  # fmt: skip
@click.option(
    "--max-dice-drop", type=click.FloatRange(0, 1), default=0.005, show_default=True,
    help="How much Dice may fall, at the upper end of its interval, where numbers are rounded.",
)  # fmt: skip
@click.option(
    "--backend", default="auto", show_default=True,
    help="The only back-end to try; auto tries all. tensorrt-rtx or tensorrt: the library that builds engines.",
)  # fmt: skip
@click.option("--target", "targets", multiple=True, help="Build engines for these GPUs: sm86,sm89,sm120.")
@engine_options
@click.option(
    "--outputs", type=click.Choice(["logits", "mask"]), default="logits", show_default=True,
    help="mask: the graphs also make masks of the images' own size.",
)  # fmt: skip
@click.option(
    "--sign",
    "sign_key",
    type=FILE,
    help="Sign the bundle with a private key in PEM: openssl genpkey -algorithm ed25519 -out sign.pem.",
)
@output_options
def build(
    checkpoint: Path, output: Path | None, data_folder: Path | None, precisions: tuple[str, ...], max_dice_drop: float,
    backend: str, targets: tuple[str, ...], outputs: Literal["logits", "mask"], sign_key: Path | None, as_json: bool,
    **engine_fields: Unpack[EngineFields],
) -> None:  # fmt: skip
    """Turn a checkpoint into a bundle: folded, fused, in several precisions, each verified, the fastest first."""
    from medseg_trt import pipeline
    from medseg_trt.spec import BuildSpec, split_precisions

    try:
        spec = BuildSpec(
            precisions=split_precisions(precisions), max_dice_drop=max_dice_drop, outputs=outputs,
            backend="auto" if backend in LIBRARY_NAMES else backend,
            engines=engine_spec(backend, targets, engine_fields),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--precision {','.join(precisions)}: {error}") from error
    bundle = pipeline.build(checkpoint, spec, output, data_folder, sign_key)
    if as_json:
        print_json({"bundle": str(bundle.folder), "manifest": bundle.manifest()})
        return
    print_table(f"{bundle.folder}, the first row is what infer uses", *bundle.table())
    if bundle.content.engines:
        print_table("engines; none has run: their masks are those of the graphs above", *bundle.engine_table())
    for line in bundle.content.dropped:
        click.echo(f"not used: {line}")
