"""Map traced nodes to parts of the network, so that every part can have its own precision.

The exporter writes the modules that a node came from into its metadata, as
``: medseg_trt.train.models.transunet.TransUNet/head: torch.nn.modules.conv.Conv2d/conv2d_23: aten.conv2d.default``.
"""

from collections.abc import Mapping

from medseg_trt.errors import MedsegError

PART_NAMES = ("resnet", "vit", "block", "decoder")  # convolutional encoder, transformers, language block, the rest
PARTS: Mapping[str, Mapping[str, str]] = {  # a network -> the beginning of a child's name -> its part
    "TransUNet": {
        "resnet": "resnet",
        "patch_embedding": "vit",
        "layers": "vit",
        "encoder_norm": "vit",
        "insert": "block",
        "bridge": "decoder",
        "decoder": "decoder",
        "head": "decoder",
    },
    "SwinUNet": {
        "patch_embed": "vit",
        "layers_up": "decoder",
        "layers": "vit",
        "insert": "block",
        "norm_up": "decoder",
        "norm": "vit",
        "concat_back_dim": "decoder",
        "up": "decoder",
        "output": "decoder",
    },
    "DSTransUNet": {
        "encoder": "vit",
        "cross_att_": "vit",
        "insert": "block",
        "change": "decoder",
        "layer": "decoder",
        "down": "decoder",
        "final": "decoder",
    },
    "UNet": {"Conv_1x1": "decoder", "Conv": "resnet", "pool": "resnet", "insert": "block", "Up": "decoder"},
    "ExternalNetwork": {"": "decoder"},  # nothing is known of its modules
    "UNetT": {"inc": "resnet", "down": "resnet", "insert": "block", "up": "decoder", "outc": "decoder"},
}
TOP_LEVEL = "vit"  # a network itself only moves, joins and adds values
OPERATOR = "aten."  # prefix of the type of the last segment; the other segments are modules


def part_of(namespace: str) -> str:
    """Return "resnet", "vit", "block" or "decoder".

    Args:
        namespace: the node's metadata of that name.

    Raises:
        MedsegError: it names no module of a network.
    """
    root, _, path = namespace.partition("/")
    name, _, kind = path.partition("/")[0].partition(": ")
    if kind.startswith(OPERATOR):
        return TOP_LEVEL
    children = PARTS.get(root.rpartition(": ")[2].rpartition(".")[2], {})
    part = next((part for beginning, part in children.items() if name.startswith(beginning)), None)
    if part is None:
        raise MedsegError(
            f"a node comes from {namespace!r}, which is no part of a network of this version; build the bundle again"
        )
    return part
