"""``medseg-trt infer``: segment images."""

from pathlib import Path
from typing import TypedDict, Unpack

import click

from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.options import ANY, FOLDER, output_options, print_result, verify_option
from medseg_trt.errors import InputError
from medseg_trt.progress import printable

BACKEND_HELP = (
    "The back-end: onnxruntime or openvino; on an NVIDIA GPU tensorrt-rtx, tensorrt, onnxruntime-cuda, "
    "onnxruntime-tensorrt or onnxruntime-tensorrt-rtx. auto: the fastest that the build measured."
)


class SessionOptions(TypedDict):
    """The options that choose how the network runs."""

    backend: str
    precision: str | None
    batch: int
    threads: int | None


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt infer ct.nii.gz --bundle model.medseg -o masks --overlay",
        "medseg-trt infer images/ --bundle model.medseg --continue",
        "medseg-trt infer images/ --precision fp32 --backend openvino --threads 4",
        "medseg-trt infer images/ --bundle model.medseg --verify-key verify.pem",
    ),
)
@click.argument("inputs", nargs=-1, required=True, type=ANY)
@click.option(
    "--bundle", "bundle_folder", type=FOLDER, help="The bundle to run.  [default: the only *.medseg folder here]"
)
@click.option("-o", "--output", type=FOLDER, default=Path("masks"), show_default=True, help="The folder for the masks.")
@click.option("--backend", default="auto", show_default=True, help=BACKEND_HELP)
@click.option("--precision", help="One of the bundle's precisions.  [default: the fastest]")
@click.option("--overlay", is_flag=True, help="Also draw the masks over the images, into overlays/.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Slices per batch.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--continue", "resume", is_flag=True, help="Resume: keep the masks that an earlier run finished.")
@click.option("--rebuild", is_flag=True, help="First rebuild the engines that do not fit this machine.")
@verify_option
@output_options
def infer(
    inputs: tuple[Path, ...],
    bundle_folder: Path | None,
    output: Path,
    overlay: bool,
    resume: bool,
    rebuild: bool,
    verify_key: Path | None,
    as_json: bool,
    **session_options: Unpack[SessionOptions],
) -> None:
    """Segment images; write masks and a table of areas.

    INPUTS are images, volumes, DICOM series and folders of them. A mask has the size and geometry of its image.
    areas.csv lists pixels, mm² and ml of every class. A file that cannot be used is reported and skipped; the exit
    code is then 1.
    """
    from medseg_trt import pipeline
    from medseg_trt.bundles.bundle import find_bundle
    from medseg_trt.inference.to_folder import MaskFolder

    def report(_path: Path, error: InputError) -> None:
        click.echo(printable(f"medseg-trt: {error}"), err=True)

    written = MaskFolder(output, overlay=overlay, resume=resume, on_error=report)
    masks = pipeline.infer(
        inputs,
        find_bundle(bundle_folder),
        destination=written,
        rebuild=rebuild,
        verify_key=verify_key,
        **session_options,
    )
    for _ in masks:
        pass
    result = {
        "masks": [str(path) for path in written.masks],
        "areas": str(written.areas),
        "kept": written.kept,
        "failed": dict(written.refused),
        "skipped": [
            {"path": str(left_out.path), "reason": left_out.reason, "files": left_out.count}
            for left_out in written.left_out
        ],
    }
    num_refused, num_left_out = len(written.refused), sum(left_out.count for left_out in written.left_out)
    print_result(
        as_json,
        result,
        f"{len(written.masks)} mask(s) in {output}, {num_refused} file(s) refused, {num_left_out} left out; "
        f"areas in {written.areas}",
    )
    if num_refused:
        raise InputError(
            f"{num_refused} of {num_refused + len(written.masks)} file(s) could not be used; they are named above"
        )
