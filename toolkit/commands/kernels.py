"""``medseg-trt kernels``: compile the CUDA kernels."""

from pathlib import Path

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import FILE, FOLDER, output_options, print_result


@click.group()
def kernels() -> None:
    """Compile the CUDA kernels and TensorRT plugins."""


@kernels.command(
    "build",
    cls=ExampleCommand,
    examples=(
        "medseg-trt kernels build -o kernels",
        "medseg-trt kernels build --arch sm_89,jetpack6 -o kernels",
    ),
)
@click.option(
    "--arch",
    "targets",
    metavar="SM,…",
    help="sm_75, sm_80, sm_86, sm_87, sm_89, sm_90, sm_120, jetpack6.  [default: all]",
)
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder for the PTX files and manifest.json.")
@output_options
def kernels_build(targets: str | None, output: Path, as_json: bool) -> None:
    """Compile the kernels to PTX.

    Needs no GPU and no CUDA installation. jetpack6 is sm_87 in PTX 8.5, for the driver of JetPack 6.
    """
    from medseg_trt.errors import require

    require("ml_dtypes", "kernels")
    from medseg_trt.kernels.library import TARGETS
    from medseg_trt.kernels.manifest import build as build_kernels
    from medseg_trt.spec import to_dict

    chosen = list(TARGETS) if targets is None else targets.split(",")
    manifest = build_kernels(output, chosen)
    text = f"{output}: {len(manifest.kernels)} functions for {', '.join(chosen)}"
    print_result(as_json, {"folder": str(output), "manifest": to_dict(manifest)}, text)


@kernels.command(
    "plugins",
    cls=ExampleCommand,
    examples=(
        "medseg-trt kernels plugins -o libmedseg_plugins.so",
        "medseg-trt kernels plugins --arch sm_89 -o libmedseg_plugins.so",
    ),
)
@click.option("--arch", "targets", metavar="SM,…", help="As for 'kernels build'.  [default: all]")
@click.option(
    "-o", "--output", type=FILE, required=True, help="The shared library to write, e.g. libmedseg_plugins.so."
)
@output_options
def kernels_plugins(targets: str | None, output: Path, as_json: bool) -> None:
    """Compile the kernels into a library of TensorRT plugins.

    Needs g++ and TensorRT's headers: set MEDSEG_TENSORRT_INCLUDE to the folder of NvInferRuntime.h.
    """
    from medseg_trt.errors import require

    require("ml_dtypes", "kernels")
    from medseg_trt.kernels.library import TARGETS
    from medseg_trt.kernels.nodes import NODES
    from medseg_trt.kernels.plugin_library import build_library

    chosen = list(TARGETS) if targets is None else targets.split(",")
    digest = build_library(output, chosen)
    result = {"library": str(output), "sha256": digest, "plugins": list(NODES), "architectures": chosen}
    print_result(as_json, result, f"{output}: {len(NODES)} plugins for {', '.join(chosen)}, sha256 {digest}")
