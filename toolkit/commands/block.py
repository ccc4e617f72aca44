"""``medseg-trt block``: extract the frozen block from a language model."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import ANY, FILE, output_options, print_result
from medseg_trt.errors import UsageError


@click.group()
def block() -> None:
    """Extract the frozen block from a LLaMA model."""


@block.command(
    "extract",
    cls=ExampleCommand,
    examples=(
        "medseg-trt block extract data/llama-block/SmolLM2-135M-Instruct.Q4_1.gguf",
        "medseg-trt block extract llama-7b/consolidated.00.pth -o block.safetensors",
        "medseg-trt block extract model_folder/ --layer 12 -o block12.safetensors",
    ),
)
@click.argument("source", type=ANY)
@click.option("--layer", help="The layer: a number from 0, or last.  [default: last]")
@click.option(
    "--layers",
    type=click.IntRange(1),
    help="Extract this many layers, ending with the last one; for insert.num_layers.",
)
@click.option(
    "--final-norm", is_flag=True, help="Also extract the norm after the last layer; for insert.norm=pretrained."
)
@click.option(
    "-o", "--output", type=FILE, default=Path("block.safetensors"), show_default=True, help="The file to write."
)
@output_options
def block_extract(
    source: Path, layer: str | None, layers: int | None, final_norm: bool, output: Path, as_json: bool
) -> None:
    """Extract layers from the weights of a LLaMA-family model.

    SOURCE is a GGUF file (also quantised), a Hugging Face folder or one of its shards, or Meta's consolidated.*.pth.
    The rest of the model is not read into memory.
    """
    from medseg_trt.spec import to_dict
    from medseg_trt.train.block.blocks import extract, extract_last, provenance_of, save_block

    if layer is not None and layers is not None:
        raise UsageError("--layer takes one layer and --layers the last ones; give one of the two")
    if layer not in (None, "last") and not layer.isdecimal():
        raise UsageError(f"--layer {layer}: give a number from 0, or last")
    if layers is not None or layer in (None, "last"):
        layers_read = extract_last(source, layers or 1, final_norm=final_norm)
    else:
        layers_read = (extract(source, int(layer), final_norm=final_norm),)
    digest = save_block(layers_read, output)
    parameters = sum(layer_weights.num_parameters for layer_weights in layers_read)
    result = {
        "file": str(output),
        "sha256": digest,
        "parameters": parameters,
        "spec": to_dict(layers_read[0].spec),
        "provenance": provenance_of(layers_read),
    }
    print_result(as_json, result, f"{output}: {parameters:,} parameters, sha256 {digest}")
