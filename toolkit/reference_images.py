"""Choose the images that a bundle is verified on: real ones where they can be had, and a record of what they were."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.export.verify import noise
from medseg_trt.progress import LOG
from medseg_trt.segment import prepared_slices
from medseg_trt.train.checkpoint import Checkpoint
from medseg_trt.train.datasets.folder import DataFolder, manifest_sha256, open_folder, read_case_image

MAX_IMAGES = 8


def reference_images(
    checkpoint: Checkpoint, data: Path | None
) -> tuple[Float32[ndarray, "images 3 height width"], str]:
    """Return prepared images, evenly spread over the validation split, and what they are.

    Args:
        checkpoint: its preprocessing is used, and without ``data`` the folder that it was trained on, if that is still
            what it was; else seeded noise, with a warning.
        data: a data folder.

    Raises:
        InputError: ``data`` cannot be used.
    """
    folder = open_folder(data) if data is not None else _recorded_folder(checkpoint)
    if folder is None:
        return noise(checkpoint.spec.image_size), "generated noise"
    split = "val" if folder.splits.get("val") else "train"
    cases = folder.cases(split)
    each = -(-MAX_IMAGES // len(cases))
    found: list[np.ndarray] = []
    for case in cases[:MAX_IMAGES]:
        image = read_case_image(case)
        prepared = prepared_slices(image, checkpoint.preprocessing)
        places = np.linspace(0, len(prepared) - 1, min(len(prepared), each)).round().astype(int)
        found += [prepared[place] for place in places]
    inputs = np.stack(found[:MAX_IMAGES])
    return inputs, f"{len(inputs)} real images of {folder.name}, split {split}"


def _recorded_folder(checkpoint: Checkpoint) -> DataFolder | None:
    """Return the folder that the checkpoint was trained on, if it is there and unchanged."""
    recorded = checkpoint.provenance.get("data")
    reason = "the checkpoint does not say what it was trained on"
    if recorded:
        try:
            folder = open_folder(Path(recorded["root"]))
            if manifest_sha256(folder.manifest()) == recorded["sha256"]:
                return folder
            reason = f"{folder.root} has changed since the training"
        except InputError as error:
            reason = str(error)
    LOG.warning("%s, so the bundle is verified on generated noise; give real images: --data DIR", reason)
    return None
