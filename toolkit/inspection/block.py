"""Say what the frozen block does in a checkpoint's network, on the training images of a data folder."""

from pathlib import Path
from typing import Any

from medseg_trt.errors import UsageError
from medseg_trt.spec import to_dict


def analyse_checkpoint(path: Path, data: Path) -> dict[str, Any]:
    """Return the analysis of a checkpoint's block as plain data.

    Args:
        path: a checkpoint with one language layer between its maps.
        data: a data folder with a training and a validation split, or a folder of images.

    Raises:
        UsageError: the network has no such block, or there are too few training images.
        InputError: ``data`` cannot be used.
        ArtefactError: the checkpoint cannot be used.
    """
    from medseg_trt.building.block_images import block_images
    from medseg_trt.building.reference_images import reference_images
    from medseg_trt.export.compress.analysis import analyse_block
    from medseg_trt.export.compress.rungs import replaceable_block
    from medseg_trt.export.compress.tokens import BlockTokens, tokens_before_block
    from medseg_trt.train.checkpoint import load_checkpoint
    from medseg_trt.train.models.model import LanguageInsert

    checkpoint = load_checkpoint(path)
    replaceable_block(checkpoint.spec)
    if checkpoint.spec.insert.parts != "full":
        raise UsageError(f"parts={checkpoint.spec.insert.parts}: the analysis needs a layer with attention and an MLP")
    judged = reference_images(checkpoint, data).judged.inputs
    images = block_images(checkpoint, data, [judged])
    network = checkpoint.model()
    assert isinstance(network.insert, LanguageInsert)  # ``replaceable_block`` requires a block
    fitted, held_out = (tokens_before_block(network, inputs) for inputs in (images.fitted, images.held_out))
    analysis = analyse_block(network.insert, BlockTokens(fitted=fitted, held_out=held_out))
    return {**to_dict(analysis), "slices": images.slices, "augmented": images.augmented, "files": list(images.files)}
