"""``medseg-trt infer``: segment images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast

import click
from click.core import ParameterSource

from medseg_trt.commands.archive_options import ArchiveOptions, archive_options
from medseg_trt.commands.help import ExampleCommand
from medseg_trt.commands.interrupts import resumable
from medseg_trt.commands.options import (
    ANY,
    FOLDER,
    completed,
    device_option,
    mpp_option,
    output_options,
    postprocess_option,
    print_result,
    tile_options,
    tiles_of,
    tta_option,
    verify_option,
)
from medseg_trt.errors import InputError, UsageError
from medseg_trt.progress import LOG, plural, printable
from medseg_trt.spec import SLICES_PER_BATCH

if TYPE_CHECKING:
    from medseg_trt.archive.mask_tree import MaskTree
    from medseg_trt.inference.to_folder import MaskFolder

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


NOT_OF_JOIN = (  # options that say how masks are made
    *("backend", "precision", "batch", "threads", "device", "rebuild"),
    *("tta", "tile", "overlap", "mpp", "postprocess", "overlay", "mask_format", "resume"),
)


def _warn_beside_join() -> None:
    """Name the options that have no effect, as those of a part's command that was typed again."""
    context = click.get_current_context()
    given = [name for name in NOT_OF_JOIN if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    options = [option.opts[-1] for option in context.command.params if option.name in given]
    if options:
        LOG.warning("--join writes the tables of the parts as they were run, without regard to %s", ", ".join(options))


def _backends() -> list[str]:
    from medseg_trt.sessions.backends import BACKENDS

    return ["auto", *BACKENDS]


@click.command(
    cls=ExampleCommand,
    examples=(
        "medseg-trt infer ct.nii.gz --bundle model.medseg -o masks --overlay",
        "medseg-trt infer images/ --bundle model.medseg --continue",
        "medseg-trt infer ct_series/ --bundle model.medseg --format dicom-seg",
        "medseg-trt infer images/ --bundle fold0.medseg --bundle fold1.medseg",
        "medseg-trt infer images/ --bundle model.medseg --tta flips --no-postprocess",
        "medseg-trt infer pictures/ --bundle model.medseg --tile auto --overlap 0.5",
        "medseg-trt infer slide.svs --bundle model.medseg --tile auto --mpp 0.25",
        "medseg-trt infer images/ --precision fp32 --backend openvino --threads 4",
        "medseg-trt infer images/ --bundle model.medseg --device cuda:1",
        "medseg-trt infer images/ --bundle model.medseg --verify-key verify.pem",
        "medseg-trt infer archive/ --tree --where Modality=CT --part 1/8",
    ),
)
@click.argument("inputs", nargs=-1, type=ANY)
@click.option(
    "--bundle",
    "bundle_folders",
    type=FOLDER,
    multiple=True,
    help="The bundle to run; of several, the mean of their logits.  [default: the only *.medseg folder here]",
)
@click.option("-o", "--output", type=FOLDER, default=Path("masks"), show_default=True, help="The folder for the masks.")
@click.option("--backend", default="auto", show_default=True, help=BACKEND_HELP, shell_complete=completed(_backends))
@click.option("--precision", help="One of the bundle's precisions.  [default: the fastest]")
@click.option("--overlay", is_flag=True, help="Also draw the masks over the images, into overlays/.")
@click.option(
    "--format",
    "mask_format",
    type=click.Choice(["auto", "dicom-seg"]),
    default="auto",
    show_default=True,
    help="auto: PNG, TIFF or NIfTI, as suits the image. dicom-seg: a DICOM segmentation, of DICOM images.",
)
@tta_option
@tile_options
@mpp_option
@click.option("--batch", type=click.IntRange(1), default=SLICES_PER_BATCH, show_default=True, help="Slices per batch.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
@click.option("--continue", "resume", is_flag=True, help="Resume: keep the masks that an earlier run finished.")
@postprocess_option
@click.option("--rebuild", is_flag=True, help="First rebuild the engines that do not fit this machine.")
@device_option
@verify_option
@archive_options
@output_options
def infer(
    inputs: tuple[Path, ...],
    bundle_folders: tuple[Path, ...],
    output: Path,
    overlay: bool,
    mask_format: Literal["auto", "dicom-seg"],
    resume: bool,
    postprocess: bool,
    tta: str | None,
    tile: str | None,
    overlap: float | None,
    mpp: float | None,
    rebuild: bool,
    device: str,
    verify_key: Path | None,
    as_json: bool,
    archive: ArchiveOptions,
    **session_options: Unpack[SessionOptions],
) -> None:
    """Segment images; write masks and a table of areas.

    INPUTS are images, volumes, DICOM series and folders of them; whole archives with --tree, as zip or tar files, by
    patterns such as 'archive/**/*.png', by a DICOMDIR and in buckets, as s3://bucket/folder, where masks may go, too. A
    mask has the size and geometry of its image. With windows, slides (SVS, tiled or pyramidal TIFF) are read and
    written by rows; their masks are tiled, pyramidal TIFF files.
    areas.csv lists pixels of every class, mm² for 2-D images with a spacing, and ml for volumes, and in which way an
    image is unlike the training images; of archives, skipped.csv lists what was not segmented. A file that cannot be
    used is reported and skipped; the exit code is then 1.
    """
    from medseg_trt import pipeline
    from medseg_trt.archive.object_store import shown
    from medseg_trt.bundles.bundle import find_bundle, load_bundle
    from medseg_trt.devices import parse_device

    def report(_path: Path, error: InputError) -> None:
        click.echo(printable(f"medseg-trt: {error}"), err=True)

    bundle = find_bundle(bundle_folders[0] if bundle_folders else None)
    written = _destination(archive, output, overlay, resume, mask_format, report)
    options: dict[str, Any] = {
        "postprocess": postprocess,
        "tta": tta,
        "tiles": tiles_of(tile, overlap, mpp),
        "device": parse_device(device),
        **session_options,
    }

    def finished() -> str | None:
        return f"{written.num_masks} of {plural(written.num_sources, 'image')} done" if written.num_masks else None

    if archive.join:
        _warn_beside_join()
        cast("MaskTree", written).join(inputs, load_bundle(bundle, verify_key))
    elif archive.ray_address is not None:
        from medseg_trt.archive.ray_run import run_on_ray

        if rebuild or len(bundle_folders) > 1:
            raise UsageError("--ray runs one bundle as it is; leave out --rebuild and further --bundle")
        checked = load_bundle(bundle, verify_key)
        run_on_ray(cast("MaskTree", written), inputs, checked, archive.ray_address, options)
    else:
        masks = pipeline.infer(
            inputs,
            bundle,
            destination=written,
            rebuild=rebuild,
            verify_key=verify_key,
            ensemble=bundle_folders[1:],
            **options,
        )
        with resumable("--continue", finished):
            for _ in masks:
                pass
    unlike = f"{plural(written.num_unusual, 'image')} unlike the training images, " if written.num_unusual else ""
    num_refused = len(written.refused)
    print_result(
        as_json,
        written.summary(),
        f"{plural(written.num_masks, 'mask')} in {shown(output)}, {plural(num_refused, 'file')} refused, "
        f"{written.num_left_out} left out; {unlike}{written.tables_text}",
    )
    if num_refused:
        total = plural(num_refused + written.num_masks, "file")
        raise InputError(f"{num_refused} of {total} could not be used; they are named above")


def _destination(
    archive: ArchiveOptions,
    output: Path,
    overlay: bool,
    resume: bool,
    mask_format: Literal["auto", "dicom-seg"],
    on_error: Callable[[Path, InputError], None],
) -> "MaskFolder":
    """Return where the masks go: a folder, or a tree of folders for an archive."""
    from medseg_trt.archive.object_store import is_object_path, shown
    from medseg_trt.inference.to_folder import MaskFolder

    if archive.request is None:
        if is_object_path(output):
            raise UsageError(
                f"masks in a bucket are those of an archive; give --tree too, or a folder instead of {shown(output)}"
            )
        return MaskFolder(output, overlay=overlay, resume=resume, mask_format=mask_format, on_error=on_error)
    from medseg_trt.archive.mask_tree import MaskTree

    return MaskTree(
        output,
        archive.request,
        part=archive.part,
        overlay=overlay,
        resume=resume,
        mask_format=mask_format,
        on_error=on_error,
    )
