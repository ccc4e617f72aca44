"""``medseg-trt inspect``: say what a file is."""

from pathlib import Path

import click

from medseg_trt.commands.options import FILE, nested_lines, output_options, print_result, print_table
from medseg_trt.errors import UsageError

PLAN = ".plan"


@click.command()
@click.argument("what")
@click.option("--image-size", type=click.IntRange(1), default=256, show_default=True, help="Of arch:NAME, in pixels.")
@click.option("--classes", type=click.IntRange(1), default=1, show_default=True, help="Of arch:NAME.")
@click.option("--picture", type=FILE, help="Draw the layers of an engine into this file, *.svg.")
@output_options
def inspect(what: str, image_size: int, classes: int, picture: Path | None, as_json: bool) -> None:
    """Say what a checkpoint, bundle, ONNX file, engine (*.plan) or architecture (arch:NAME) is."""
    if picture is not None and (not what.endswith(PLAN) or picture.suffix.lower() != ".svg"):
        raise UsageError(
            "--picture FILE.svg draws the layers of an engine: medseg-trt inspect engine.plan --picture a.svg"
        )
    from medseg_trt.inspection import describe

    if what.endswith(PLAN) and Path(what).exists() and not as_json:
        _show_engine(Path(what))
    else:
        found = describe(what, image_size, classes)
        print_result(as_json, found, "\n".join(nested_lines(found)))
    if picture is not None:
        _draw_engine(Path(what), picture)


def _show_engine(plan: Path) -> None:
    from medseg_trt.engines.inspection import inspect_engine, shares
    from medseg_trt.spec import to_dict

    engine = inspect_engine(plan)
    print_table(f"{plan}, in the order of the engine", *engine.layer_table())
    print_table("what the layers were expected to be", *engine.outcome_table())
    click.echo("\n".join(nested_lines({"state": engine.state, **to_dict(engine.fingerprint)})))
    macs = ", ".join(f"{100 * share:.1f} % in {dtype}" for dtype, share in shares(engine.report.layers).items())
    click.echo(f"multiply-accumulates: {macs or 'none known'}")


def _draw_engine(plan: Path, picture: Path) -> None:
    from medseg_trt.engines.inspection import inspect_engine
    from medseg_trt.engines.layer_picture import draw_layers
    from medseg_trt.files import atomic_file

    engine = inspect_engine(plan)
    with atomic_file(picture) as temporary:
        temporary.write_text(draw_layers(engine.report, engine.fingerprint), encoding="utf-8")
    click.echo(f"drew {picture}", err=True)
