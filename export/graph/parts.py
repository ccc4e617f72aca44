"""Tell which part of the network a traced node belongs to, so that parts can have precisions of their own.

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
BETWEEN = "vit"  # TransUNet itself only reshapes the tokens and adds their positions
OPERATOR = "aten."  # how the type of a last segment begins; those of the others are modules


def part_of(namespace: str) -> str:
    """Return "resnet", "vit", "block" or "decoder".

    Args:
        namespace: a node's metadata of that name.

    Raises:
        MedsegError: it names no module of a TransUNet.
    """
    _, _, path = namespace.partition("/")
    name, _, kind = path.partition("/")[0].partition(": ")
    if kind.startswith(OPERATOR):
        return BETWEEN
    part = PARTS.get(name.partition(".")[0])
    if part is None:
        raise MedsegError(f"a node comes from {namespace!r}, which is no part of a TransUNet; build the graph again")
    return part
