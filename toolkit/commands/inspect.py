"""``medseg-trt inspect``: say what a file is."""

import click

from medseg_trt.commands.options import nested_lines, output_options, print_result


@click.command()
@click.argument("what")
@click.option("--image-size", type=click.IntRange(1), default=256, show_default=True, help="Of arch:NAME, in pixels.")
@click.option("--classes", type=click.IntRange(1), default=1, show_default=True, help="Of arch:NAME.")
@output_options
def inspect(what: str, image_size: int, classes: int, as_json: bool) -> None:
    """Say what a checkpoint, bundle, ONNX file or architecture (arch:NAME) is."""
    from medseg_trt.inspection import describe

    found = describe(what, image_size, classes)
    print_result(as_json, found, "\n".join(nested_lines(found)))
