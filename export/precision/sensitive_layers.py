"""Name the few layers whose rounding to eight bits costs most for the time that it saves; they stay in float.

The first ones see the image itself: their kernels have a mean of zero, and what they take of neighbouring pixels are
differences no larger than a step of the codes. The last ones add up few products, over which no noise evens out, and
nothing comes after them. In the full-size network of ``benchmarks/bench_cpu.py`` they hold 5 % of the MACs and cause
more than half of the squared error of the logits, and the outermost of them are no slower in bfloat16.
"""

from collections.abc import Collection

from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.modules import module_of
from medseg_trt.export.graph.trace import OnnxGraph

MODULES = (  # those first that cause most error for their work
    "resnet.root.0",
    "head",
    "resnet.block1",
    "decoder.3.conv2",
    "decoder.2.conv2",
    "decoder.1.conv2",
    "decoder.3.conv1",
    "decoder.0.conv2",
)
MAX_SHARE = 0.05  # of the network's MACs; a small image's last stages are a quarter of the work


def sensitive_layers(graph: OnnxGraph, rounded: Collection[str]) -> tuple[str, ...]:
    """Return those of the GEMMs to be rounded that should stay in float.

    Args:
        graph: traced, folded and fused.
        rounded: names of the GEMMs that are to multiply eight-bit codes.
    """
    nodes = {node.name: node for node in graph.model.graph}
    kept, left = list[str](), MAX_SHARE * total_macs(graph)
    for module in MODULES:
        inside = [
            gemm for gemm in gemms(graph)
            if gemm.name in rounded and f"{module_of(nodes[gemm.name])}.".startswith(f"{module}.")
        ]  # fmt: skip
        left -= sum(gemm.macs for gemm in inside)
        if left < 0:
            break
        kept += [gemm.name for gemm in inside]
    return tuple(kept)
