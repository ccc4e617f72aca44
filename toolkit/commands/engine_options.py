"""The options of ``medseg-trt build`` for engines, and the ``EngineSpec`` made from them."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import click

from medseg_trt.errors import DeviceError, UsageError
from medseg_trt.spec import LIBRARY_NAMES, MAX_BATCH, SLICES_PER_BATCH, EngineSpec, Hardware


class EngineFields(TypedDict):
    """The values of the options."""

    plugins: str
    opt_batch: int
    max_batch: int
    workspace_gib: float | None
    optimization_level: int
    strip: bool
    version_compatible: bool
    hardware_compatible: Hardware
    reproducible_engine: bool


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for engines to a command."""
    for option in (
        click.option(
            "--plugins",
            type=click.Choice(["on", "off"]),
            default="off",
            show_default=True,
            help="Engines: run the CUDA kernels of medseg-trt as plugins.",
        ),
        click.option(
            "--opt-batch",
            type=click.IntRange(1),
            help=f"Engines: the batch size to optimise for.  [default: {SLICES_PER_BATCH}, or --max-batch]",
        ),
        click.option(
            "--max-batch",
            type=click.IntRange(1),
            default=MAX_BATCH,
            show_default=True,
            help="Engines: the largest batch size.",
        ),
        click.option(
            "--workspace-gib",
            type=click.FloatRange(0, min_open=True),
            help="Engines: limit of the GPU workspace.  [default: that of the library]",
        ),
        click.option(
            "--optimization-level",
            type=click.IntRange(0, 5),
            default=3,
            show_default=True,
            help="Engines: search effort of the builder for faster kernels.",
        ),
        click.option("--strip", is_flag=True, help="Engines: leave out the weights; loading refits them."),
        click.option("--version-compatible", is_flag=True, help="Engines: support later versions (classic library)."),
        click.option(
            "--hardware-compatible",
            type=click.Choice(["none", "same_compute_capability", "ampere_plus"]),
            default="none",
            show_default=True,
            help="Engines: other GPUs to support (classic library).",
        ),
        click.option(
            "--reproducible-engine",
            is_flag=True,
            help="Engines: build on one core with fixed addresses, for identical bytes; fixed thread order needs root.",
        ),
    ):
        command = option(command)
    return command


def engine_spec(backend: str, targets: Sequence[str], fields: EngineFields, gpu_number: int = 0) -> EngineSpec | None:
    """Make the ``EngineSpec`` of the options; None if no engines are requested.

    Raises:
        UsageError: options that contradict each other.
        DeviceError: no GPU is named, and this machine has none.
        MissingExtraError: no library is installed.
        ValueError: a value that cannot work.
    """
    names = [word.strip().lower() for text in targets for word in text.split(",") if word.strip()]
    if not names and backend not in LIBRARY_NAMES:
        return None
    if names and backend not in ("auto", *LIBRARY_NAMES):
        raise UsageError(f"--backend {backend} builds no engines; with --target take {' or '.join(LIBRARY_NAMES)}")
    from medseg_trt.engines.build import default_library
    from medseg_trt.gpu import find_gpu

    if not names:
        gpu = find_gpu(gpu_number)
        if gpu is None:
            raise DeviceError(
                f"this machine has no GPU to build for; name some: --backend {backend} --target sm86,sm89,sm120"
            )
        names = [gpu.sm]
    return EngineSpec(
        library=backend if backend in LIBRARY_NAMES else default_library(),
        targets=tuple(dict.fromkeys(names)),
        opt_batch=fields["opt_batch"] or min(SLICES_PER_BATCH, fields["max_batch"]),
        max_batch=fields["max_batch"],
        workspace_gib=fields["workspace_gib"],
        optimization_level=fields["optimization_level"],
        plugins=fields["plugins"] == "on",
        stripped=fields["strip"],
        version_compatible=fields["version_compatible"],
        hardware=fields["hardware_compatible"],
        reproducible=fields["reproducible_engine"],
    )
