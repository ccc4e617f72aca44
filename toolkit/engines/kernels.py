"""Add kernels as PTX to a bundle with engines, so that inference needs no compiler.

The kernels preprocess images and label pixels on the GPU, and compute the plugin nodes of engines built with plugins.
"""

from pathlib import Path

from medseg_trt.errors import MissingExtraError
from medseg_trt.kernels.manifest import build
from medseg_trt.kernels.nodes import NODES
from medseg_trt.progress import LOG
from medseg_trt.spec import EngineSpec

FOLDER = "kernels"  # of a bundle
FOR_PICTURES = ("image_to_tensor", "logits_to_mask")
PORTABLE = "sm_80"  # the driver compiles its PTX for every later GPU
JETPACK_6 = "jetpack6"  # its driver reads older PTX only
ORIN = "sm87"  # the GPU of JetPack 6


def add_kernels(folder: Path, spec: EngineSpec) -> tuple[str, ...]:
    """Compile the kernels into a bundle that is being built; return a note where the compiler is missing.

    Raises:
        MissingExtraError: the compiler is missing, and engines with plugins need the kernels.
    """
    targets = [PORTABLE, *([JETPACK_6] if ORIN in spec.targets else [])]
    for_plugins = sorted({node.kernel_name for node in NODES.values()}) if spec.plugins else []
    try:
        build(folder / FOLDER, targets, (*FOR_PICTURES, *for_plugins))
    except MissingExtraError as error:
        if spec.plugins:
            raise
        LOG.warning("images will be preprocessed and labelled on the CPU: %s", error)
        return (f"kernels that preprocess and label images on the GPU: {error}",)
    return ()
