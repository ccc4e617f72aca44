"""Add kernels as PTX to a bundle with engines, so that inference needs no compiler.

The kernels preprocess images and label pixels on the GPU, and compute the plugin nodes of engines built with plugins.
"""

from collections.abc import Mapping
from pathlib import Path

from medseg_trt.errors import MissingExtraError
from medseg_trt.kernels.manifest import build
from medseg_trt.kernels.nodes import NODES
from medseg_trt.progress import LOG
from medseg_trt.spec import EngineSpec

KERNELS_FOLDER = "kernels"  # of a bundle
FOR_PICTURES = ("image_to_tensor", "logits_to_mask")
PORTABLE = "sm_80"  # the driver compiles its PTX for every later GPU
FURTHER: Mapping[str, str] = {  # GPU of an engine -> a target besides
    "sm75": "sm_75",  # of the kernels on images alone
    "sm87": "jetpack6",  # the GPU of JetPack 6, whose driver reads older PTX only
}


def add_kernels(folder: Path, spec: EngineSpec) -> tuple[str, ...]:
    """Compile the kernels into a bundle that is being built; return a note where the compiler is missing.

    Raises:
        MissingExtraError: the compiler is missing, and engines with plugins need the kernels.
    """
    targets = [PORTABLE, *(FURTHER[gpu] for gpu in spec.targets if gpu in FURTHER)]
    for_plugins = sorted({node.kernel_name for node in NODES.values()}) if spec.plugins else []
    try:
        build(folder / KERNELS_FOLDER, targets, (*FOR_PICTURES, *for_plugins))
    except MissingExtraError as error:
        if spec.plugins:
            raise
        LOG.warning("images will be preprocessed and labelled on the CPU: %s", error)
        return (f"kernels that preprocess and label images on the GPU: {error}",)
    return ()
