"""``medseg-trt export``: write a bundle in the form of another tool."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FOLDER, output_options, print_result, verify_option


@click.group()
def export() -> None:
    """Write a bundle for another server."""


@export.command(cls=ExampleCommand, examples=("medseg-trt export triton --bundle model.medseg -o model_repository",))
@click.option("--bundle", "bundle_folder", type=FOLDER, help="The bundle.  [default: the only *.medseg folder here]")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("model_repository"), show_default=True, help="The model repository."
)
@verify_option
@output_options
def triton(bundle_folder: Path | None, output: Path, verify_key: Path | None, as_json: bool) -> None:
    """Write a model repository for NVIDIA Triton.

    It gets an ONNX Runtime model and one model for every TensorRT engine of the bundle. Preprocessing and the masks'
    size stay with the client.
    """
    from medseg_trt.bundles.bundle import find_bundle, load_bundle
    from medseg_trt.serve.triton_export import export_triton

    models = export_triton(load_bundle(find_bundle(bundle_folder), verify_key), output)
    result = {
        "repository": str(output),
        "models": [
            {"name": model.name, "platform": model.platform, "precision": model.precision, "folder": str(model.folder)}
            for model in models
        ],
    }
    named = ", ".join(f"{model.name} ({model.platform}, {model.precision})" for model in models)
    print_result(as_json, result, f"{len(models)} model(s) in {output}: {named}")
