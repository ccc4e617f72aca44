"""``medseg-trt infer``: segment images."""

from pathlib import Path

import click

from medseg_trt.commands.options import ANY, FOLDER, output_options, print_result, verify_option
from medseg_trt.errors import InputError
from medseg_trt.plain_text import printable


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=ANY)
@click.option("--bundle", "bundle_folder", type=FOLDER, help="The bundle to run.  [default: the only *.medseg here]")
@click.option("-o", "--output", type=FOLDER, default=Path("masks"), show_default=True, help="Where the masks go.")
@click.option(
    "--backend", default="auto", show_default=True,
    help="What runs the network: onnxruntime, openvino; on an NVIDIA GPU tensorrt-rtx, tensorrt, onnxruntime-cuda, "
    "onnxruntime-tensorrt, onnxruntime-tensorrt-rtx. auto takes the fastest that was measured at the build.",
)  # fmt: skip
@click.option("--precision", help="One of the bundle's.  [default: the fastest]")
@click.option("--overlay", is_flag=True, help="Also draw the masks over the images, in overlays/.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Slices at once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--continue", "resume", is_flag=True, help="Keep the masks that an earlier run finished.")
@click.option("--rebuild", is_flag=True, help="First build those engines again that do not fit this machine.")
@verify_option
@output_options
def infer(
    inputs: tuple[Path, ...], bundle_folder: Path | None, output: Path, backend: str, precision: str | None,
    overlay: bool, batch: int, threads: int | None, resume: bool, rebuild: bool, verify_key: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Segment images and folders of images; write masks and a table of areas."""
    from medseg_trt.bundle import find_bundle
    from medseg_trt.mask_folder import infer_to_folder

    def report(_path: Path, error: InputError) -> None:
        click.echo(printable(f"medseg-trt: {error}"), err=True)

    folder = find_bundle(bundle_folder)
    if rebuild:
        from medseg_trt.bundle import load_bundle
        from medseg_trt.engines.build import rebuild_engines

        verified = load_bundle(folder, verify_key)
        if rebuild_engines(verified).content != verified.content:
            verify_key = None  # what it was built from is verified; what was built here nobody has signed
    written = infer_to_folder(
        inputs, folder, output,
        backend=backend, precision=precision, overlay=overlay, batch=batch, threads=threads, resume=resume,
        verify_key=verify_key, on_error=report,
    )  # fmt: skip
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
