"""``medseg-trt kit``: collect everything that a machine without a network needs."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FOLDER, output_options, print_result


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt kit --python 3.12 --extras cpu,openvino,medical --samples organs",
        "medseg-trt kit --extras kernels,export --given torch==2.11.0 --with-tests",
    ),
)
@click.option("--python", default="3.12", show_default=True, help="The target's Python: a version, or one's path here.")
@click.option("--extras", default="cpu,openvino,medical", show_default=True, help="Comma-separated; empty for none.")
@click.option("--samples", default="", help="Samples to include, comma-separated, for 'samples get' there.")
@click.option("--parts", default="48M", show_default=True, metavar="SIZE", help="Size of the parts at most: K, M or G.")
@click.option(
    "--given", default="", metavar="PACKAGES", help="Left out: what the target has, as NAME or NAME==VERSION, …"
)
@click.option("--cuda-torch", is_flag=True, help="Accept a PyTorch that brings CUDA along.")
@click.option("--with-tests", is_flag=True, help="Include tests and benchmarks; gpu_check.py needs the extra kernels.")
@click.option("--source", type=FOLDER, default=Path(), show_default=True, help="A clone of the repository.")
@click.option(
    "-o", "--output", type=FOLDER, default=Path("dist/kit"), show_default=True, help="The folder to write to."
)
@output_options
def kit(
    python: str,
    extras: str,
    samples: str,
    parts: str,
    given: str,
    cuda_torch: bool,
    with_tests: bool,
    source: Path,
    output: Path,
    as_json: bool,
) -> None:
    """Collect everything that a machine without a network needs."""
    from medseg_trt.kit.make import make_kit
    from medseg_trt.kit.spec import KitSpec, parse_size
    from medseg_trt.progress import plural

    spec = KitSpec(
        source=source,
        python=python,
        extras=_split(extras),
        samples=_split(samples),
        given=_split(given),
        part_bytes=parse_size(parts),
        with_tests=with_tests,
        cuda_torch=cuda_torch,
    )
    made = make_kit(spec, output)
    result = {
        "folder": str(made.folder),
        "python": made.python,
        "parts": [part.name for part in made.parts],
        "bytes": made.num_bytes,
        "packages": {wheel.name: wheel.version for wheel in made.wheels},
    }
    packages, number = plural(len(made.wheels), "package"), plural(len(made.parts), "part")
    size = f"{made.num_bytes / 1e6:.0f} MB"
    text = f"{made.folder}: {packages} for Python {made.python} in {number}, {size}; README.txt says what to type"
    print_result(as_json, result, text)
