"""Give a bundle with engines the kernels that run beside them, as PTX, so that who infers needs no compiler.

They prepare and label pictures on the GPU, and, where engines were built with plugins, compute their nodes.
"""

from pathlib import Path

from medseg_trt.errors import MissingExtraError
from medseg_trt.kernels.manifest import build
from medseg_trt.kernels.nodes import NODES
from medseg_trt.progress import LOG
from medseg_trt.spec import EngineSpec

FOLDER = "kernels"  # of a bundle
FOR_PICTURES = ("image_to_tensor", "logits_to_mask")
PORTABLE = "sm_80"  # its PTX is compiled for every later GPU by the driver
JETPACK_6 = "jetpack6"  # whose driver reads older PTX only
ORIN = "sm87"  # the GPU of JetPack 6


def add_kernels(folder: Path, spec: EngineSpec) -> tuple[str, ...]:
    """Compile the kernels into a bundle that is being made; return why not, where a compiler is missing.

    Raises:
        MissingExtraError: a compiler is missing, and engines with plugins cannot do without the kernels.
    """
    targets = [PORTABLE, *([JETPACK_6] if ORIN in spec.targets else [])]
    for_plugins = sorted({node.kernel_name for node in NODES.values()}) if spec.plugins else []
    try:
        build(folder / FOLDER, targets, (*FOR_PICTURES, *for_plugins))
    except MissingExtraError as error:
        if spec.plugins:
            raise
        LOG.warning("pictures will be prepared and labelled on the CPU: %s", error)
        return (f"kernels that prepare and label pictures on the GPU: {error}",)
    return ()
