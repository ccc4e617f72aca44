"""Give a bundle the kernels that prepare and label pictures on a GPU, as PTX, so that who infers needs no compiler."""

from collections.abc import Collection
from pathlib import Path

from medseg_trt.errors import MissingExtraError
from medseg_trt.kernels.manifest import build
from medseg_trt.progress import LOG

FOLDER = "kernels"  # of a bundle
KERNELS = ("image_to_tensor", "logits_to_mask")
PORTABLE = "sm_80"  # its PTX is compiled for every later GPU by the driver
JETPACK_6 = "jetpack6"  # whose driver reads older PTX only
ORIN = "sm87"  # the GPU of JetPack 6


def add_image_kernels(folder: Path, gpus: Collection[str]) -> tuple[str, ...]:
    """Compile the kernels into a bundle that is being made; return why not, where a compiler is missing.

    Args:
        folder: of the bundle.
        gpus: that its engines are for, "sm86", "sm87" …
    """
    targets = [PORTABLE, *([JETPACK_6] if ORIN in gpus else [])]
    try:
        build(folder / FOLDER, targets, KERNELS)
    except MissingExtraError as error:
        LOG.warning("pictures will be prepared and labelled on the CPU: %s", error)
        return (f"kernels that prepare and label pictures on the GPU: {error}",)
    return ()
