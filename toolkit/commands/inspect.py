"""``medseg-trt inspect``: describe a checkpoint, bundle, ONNX file, engine or architecture."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FILE, nested_lines, output_options, print_result, print_table
from medseg_trt.errors import UsageError

PLAN = ".plan"


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt inspect run/best.pt",
        "medseg-trt inspect model.medseg",
        "medseg-trt inspect model.medseg/engines/fp16-sm89.plan --picture layers.svg",
        "medseg-trt inspect arch:llm-transunet --image-size 256 --classes 9",
    ),
)
@click.argument("what")
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
@click.option("--picture", type=FILE, help="For *.plan: draw the layers of the engine into this SVG file.")
@output_options
def inspect(what: str, image_size: int, classes: int, picture: Path | None, as_json: bool) -> None:
    """Describe a checkpoint, bundle, ONNX file or engine.

    WHAT is a file or folder, or arch:NAME for an architecture. An engine (*.plan) is described from the files beside
    it; the plan itself is not loaded.
    """
    if picture is not None and (not what.endswith(PLAN) or picture.suffix.lower() != ".svg"):
        raise UsageError(
            "--picture FILE.svg draws the layers of an engine: medseg-trt inspect engine.plan --picture a.svg"
        )
    from medseg_trt.inspection.describe import describe

    if what.endswith(PLAN) and Path(what).exists() and not as_json:
        _show_engine(Path(what))
    else:
        found = describe(what, image_size, classes)
        print_result(as_json, found, "\n".join(nested_lines(found)))
    if picture is not None:
        _draw_engine(Path(what), picture)


def _show_engine(plan: Path) -> None:
    from medseg_trt.inspection.engine import inspect_engine, shares
    from medseg_trt.spec import to_dict

    engine = inspect_engine(plan)
    print_table(f"{plan}, in the order of the engine", *engine.layer_table())
    print_table("what the layers were expected to be", *engine.outcome_table())
    click.echo("\n".join(nested_lines({"state": engine.state, **to_dict(engine.fingerprint)})))
    macs = ", ".join(f"{100 * share:.1f} % in {dtype}" for dtype, share in shares(engine.report.layers).items())
    click.echo(f"multiply-accumulates: {macs or 'none known'}")


def _draw_engine(plan: Path, picture: Path) -> None:
    from medseg_trt.files import atomic_file
    from medseg_trt.inspection.engine import inspect_engine
    from medseg_trt.inspection.layer_picture import draw_layers

    engine = inspect_engine(plan)
    with atomic_file(picture) as temporary:
        temporary.write_text(draw_layers(engine.report, engine.fingerprint), encoding="utf-8")
    click.echo(f"drew {picture}", err=True)
