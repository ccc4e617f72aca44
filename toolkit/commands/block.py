"""``medseg-trt block``: take the frozen block out of a language model."""

from pathlib import Path

import click

from medseg_trt.commands.options import ANY, FILE, output_options, print_result
from medseg_trt.errors import UsageError


@click.group()
def block() -> None:
    """The frozen LLaMA block."""


@block.command("extract")
@click.argument("source", type=ANY)
@click.option("--layer", help="Which layer: a number from 0, or last.  [default: last]")
@click.option("--layers", type=click.IntRange(1), help="Take this many layers, up to the last; for insert.num_layers.")
@click.option("--final-norm", is_flag=True, help="Also take the norm after the last layer; for insert.norm=pretrained.")
@click.option("-o", "--output", type=FILE, default=Path("block.safetensors"), show_default=True)
@output_options
def block_extract(
    source: Path, layer: str | None, layers: int | None, final_norm: bool, output: Path, as_json: bool
) -> None:  # fmt: skip
    """Take layers out of LLaMA-family weights: GGUF, Hugging Face, or Meta's consolidated.*.pth."""
    from medseg_trt.spec import to_dict
    from medseg_trt.train.blocks import extract, extract_last, provenance_of, save_block

    if layer is not None and layers is not None:
        raise UsageError("--layer takes one layer and --layers the last ones; give one of the two")
    if layer not in (None, "last") and not layer.isdecimal():
        raise UsageError(f"--layer {layer}: give a number from 0, or last")
    if layers is not None or layer in (None, "last"):
        taken = extract_last(source, layers or 1, final_norm=final_norm)
    else:
        taken = (extract(source, int(layer), final_norm=final_norm),)
    digest = save_block(taken, output)
    parameters = sum(each.num_parameters for each in taken)
    result = {
        "file": str(output), "sha256": digest, "parameters": parameters, "spec": to_dict(taken[0].spec),
        "provenance": provenance_of(taken),
    }  # fmt: skip
    print_result(as_json, result, f"{output}: {parameters:,} parameters, sha256 {digest}")
