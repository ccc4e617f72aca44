"""Select the layers that cause the largest error in eight bits for the time that this saves; they stay in float.

The first layers read the image itself: their kernels have a mean of zero, so that they compute differences of
neighbouring pixels, which are no larger than a quantisation step. The last layers sum few products, so that rounding
errors do not average out, and no layer follows them. In the full-size network of ``benchmarks/bench_cpu.py`` these
layers have 9 % of the MACs outside of the block and cause more than half of the squared error of the logits, and the
outermost of them are no slower in bfloat16. The last three, half of these MACs, gain .7 dB and cost 3 % of the time.
"""

from collections.abc import Collection

from medseg_trt.export.graph.gemms import gemms, total_macs
from medseg_trt.export.graph.modules import module_of
from medseg_trt.export.graph.node_costs import node_costs
from medseg_trt.export.graph.trace import OnnxGraph

TRANSUNET_MODULES = (  # in descending order of error per MAC
    "resnet.root.0",
    "head",
    "resnet.block1",
    "decoder.3.conv2",
    "decoder.2.conv2",
    "decoder.1.conv2",
    "decoder.3.conv1",
    "decoder.0.conv2",
)
MODULES = (
    *TRANSUNET_MODULES,
    *("Conv1.conv.0", "Conv_1x1"),  # of the other networks only the layers that read the image or make the logits
    *("inc.double_conv.0", "outc.conv"),
    *("patch_embed.proj", "output"),
    *("image_layer", "logits_layer"),  # of networks from elsewhere
    *("down1", "encoder.patch_embed.proj", "encoder2.patch_embed.proj", "final"),
)
BLOCK = "block"  # its MACs do not count, so that a cheaper block leaves as many other layers in float
MAX_SHARE = 0.05  # of the other MACs; for small images, the last stages alone have a quarter of them, and stay int8


def sensitive_layers(graph: OnnxGraph, rounded: Collection[str], max_share: float = MAX_SHARE) -> tuple[str, ...]:
    """Return those of the GEMMs to be quantised that should stay in float.

    Args:
        graph: traced, folded and fused.
        rounded: names of the GEMMs to be quantised.
        max_share: limit for the share of the returned GEMMs in the MACs outside of the language block, 0 … 1.
    """
    nodes = {node.name: node for node in graph.model.graph}
    kept, remaining_macs = list[str](), max_share * macs_outside_block(graph)
    for module in MODULES:
        of_module = [
            gemm
            for gemm in gemms(graph)
            if gemm.name in rounded and f"{module_of(nodes[gemm.name])}.".startswith(f"{module}.")
        ]
        remaining_macs -= sum(gemm.macs for gemm in of_module)
        if remaining_macs < 0:
            break
        kept += [gemm.name for gemm in of_module]
    return tuple(kept)


def macs_outside_block(graph: OnnxGraph) -> int:
    """Return the MACs of one image without those of the language block or its replacement."""
    return total_macs(graph) - sum(cost.macs for cost in node_costs(graph) if cost.part == BLOCK)
