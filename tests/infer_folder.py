"""Run ``medseg_trt.infer`` into a folder, as the command does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer


def infer_to_folder(
    inputs: Sequence[Path],
    bundle: Path,
    output: Path,
    *,
    overlay: bool = False,
    resume: bool = False,
    on_error: Callable[[Path, InputError], None],
    **options: Any,
) -> MaskFolder:
    """Segment images, write all files, and return what was written."""
    written = MaskFolder(output, overlay=overlay, resume=resume, on_error=on_error)
    for mask in infer(inputs, bundle, destination=written, **options):
        assert written.masks[-1].parent == output
        assert written.masks[-1].name.startswith(mask.stem or mask.path.name.split(".")[0])
    return written
