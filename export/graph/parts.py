"""Map traced nodes to parts of the network, so that every part can have its own precision.

The exporter writes the modules that a node came from into its metadata, as
``: medseg_trt.train.models.transunet.TransUNet/head: torch.nn.modules.conv.Conv2d/conv2d_23: aten.conv2d.default``.
"""

from collections.abc import Mapping

from medseg_trt.errors import MedsegError

PARTS: Mapping[str, str] = {  # a child of TransUNet -> its part
    "resnet": "resnet",
    "patch_embedding": "vit",
    "layers": "vit",
    "encoder_norm": "vit",
    "insert": "block",
    "bridge": "decoder",
    "decoder": "decoder",
    "head": "decoder",
}
TOP_LEVEL = "vit"  # TransUNet itself only reshapes the tokens and adds the position embedding
OPERATOR = "aten."  # prefix of the type of the last segment; the other segments are modules


def part_of(namespace: str) -> str:
    """Return "resnet", "vit", "block" or "decoder".

    Args:
        namespace: the node's metadata of that name.

    Raises:
        MedsegError: it names no module of a TransUNet.
    """
    _, _, path = namespace.partition("/")
    name, _, kind = path.partition("/")[0].partition(": ")
    if kind.startswith(OPERATOR):
        return TOP_LEVEL
    part = PARTS.get(name.partition(".")[0])
    if part is None:
        raise MedsegError(f"a node comes from {namespace!r}, which is no part of a TransUNet; build the bundle again")
    return part
