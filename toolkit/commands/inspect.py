"""``medseg-trt inspect``: describe a checkpoint, bundle, ONNX file, engine or architecture."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import (
    FILE,
    FOLDER,
    nested_lines,
    output_options,
    print_json,
    print_table,
    print_text,
)
from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG

if TYPE_CHECKING:
    from medseg_trt.inspection.describe import Description

PLAN, CHECKPOINT = ".plan", ".pt"


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt inspect run/best.pt",
        "medseg-trt inspect run/best.pt --data data/organs",
        "medseg-trt inspect model.medseg",
        "medseg-trt inspect model.medseg/engines/fp16-sm89.plan --picture layers.svg",
        "medseg-trt inspect arch:llm-transunet --image-size 256 --classes 9",
    ),
)
@click.argument("target", metavar="WHAT")
@click.option(
    "--image-size",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="For arch:NAME: the image size in pixels.",
)
@click.option(
    "--classes", type=click.IntRange(1), default=1, show_default=True, help="For arch:NAME: the number of classes."
)
@click.option(
    "--data",
    "data_folder",
    type=FOLDER,
    help="For a checkpoint: analyse what its language block does on the training images of this folder.",
)
@click.option("--picture", "svg_file", type=FILE, help="For *.plan: draw the layers of the engine into this SVG file.")
@output_options
def inspect(
    target: str, image_size: int, classes: int, data_folder: Path | None, svg_file: Path | None, as_json: bool
) -> None:
    """Describe a checkpoint, bundle, ONNX file or engine.

    A bundle or checkpoint is summed up; -v and --json show everything that is recorded.

    WHAT is a file or folder, or arch:NAME for an architecture. An engine (*.plan) is described from the files beside
    it; the plan itself is not loaded.
    """
    if svg_file is not None and (not target.endswith(PLAN) or svg_file.suffix.lower() != ".svg"):
        raise UsageError(
            "--picture FILE.svg draws the layers of an engine: medseg-trt inspect engine.plan --picture a.svg"
        )
    if data_folder is not None and not target.endswith(CHECKPOINT):
        raise UsageError(
            "--data DIR analyses the language block of a checkpoint: medseg-trt inspect model.pt --data DIR"
        )
    from medseg_trt.inspection.describe import describe

    if target.endswith(PLAN) and Path(target).exists() and not as_json:
        _show_engine(Path(target))
    else:
        description = describe(target, image_size, classes)
        values = description.to_dict()
        if data_folder is not None:
            from medseg_trt.inspection.block import analyse_checkpoint

            values["block"] |= {"analysis": analyse_checkpoint(Path(target), data_folder)}
        if as_json:
            print_json(values)
        elif LOG.isEnabledFor(logging.DEBUG) or data_folder is not None:
            print_text("\n".join(nested_lines(values)))
        else:
            _show_summary(description)
    if svg_file is not None:
        _draw_engine(Path(target), svg_file)


def _show_summary(description: "Description") -> None:
    from medseg_trt.bundles.tables import choice, engine_table, execution_table
    from medseg_trt.inspection.describe import BundleDescription, CheckpointDescription
    from medseg_trt.inspection.overview import bundle_lines, checkpoint_lines

    if isinstance(description, BundleDescription):
        bundle = description.bundle
        print_text("\n".join(bundle_lines(bundle)))
        print_table(f"{bundle.folder}; infer uses the first row", *execution_table(bundle))
        print_text(choice(bundle))
        if bundle.postprocessing is not None:
            print_table(
                f"post-processing, chosen on {bundle.postprocessing.description}", *bundle.postprocessing.table()
            )
        if bundle.content.engines:
            print_table("engines", *engine_table(bundle))
    elif isinstance(description, CheckpointDescription):
        print_text("\n".join(checkpoint_lines(description)))
    else:
        print_text("\n".join(nested_lines(description.to_dict())))


def _show_engine(plan: Path) -> None:
    from medseg_trt.inspection.engine import inspect_engine, shares
    from medseg_trt.spec import to_dict

    engine = inspect_engine(plan)
    print_table(f"{plan}, in the order of the engine", *engine.layer_table())
    print_table("expectations of the layers", *engine.outcome_table())
    print_text("\n".join(nested_lines({"state": engine.state, **to_dict(engine.fingerprint)})))
    macs = ", ".join(f"{100 * share:.1f} % in {dtype}" for dtype, share in shares(engine.report.layers).items())
    print_text(f"multiply-accumulates: {macs or 'unknown'}")


def _draw_engine(plan: Path, svg_file: Path) -> None:
    from medseg_trt.files import atomic_file
    from medseg_trt.inspection.engine import inspect_engine
    from medseg_trt.inspection.layer_picture import draw_layers

    engine = inspect_engine(plan)
    with atomic_file(svg_file) as temporary:
        temporary.write_text(draw_layers(engine.report, engine.fingerprint), encoding="utf-8")
    print_text(f"drew {svg_file}", err=True)
