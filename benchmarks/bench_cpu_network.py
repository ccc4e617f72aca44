"""Checkpoints of full-size networks with seeded random weights, and the images of the CPU benchmarks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bench_cpu_weights import initialise

from medseg_trt.errors import require
from medseg_trt.imaging.images import find_images, read_image
from medseg_trt.imaging.preprocess import prepare
from medseg_trt.samples.catalogue import get
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.provenance import Provenance
from medseg_trt.train.recipes.recipes import RECIPES

IMAGE_SIZE = (256, 256)
SEED = 0
SHOWN = 4  # images on which the last layer is set up
FIELD_MM = 384.0  # sides of the field of view, that of the recipe for these scans


def image_folder(folder: Path, names: Sequence[str], count: int) -> Path:
    """Write ``count`` slices of each scan, evenly spread, and no masks; return the folder that holds them."""
    nibabel = require("nibabel", "medical")
    (sample,) = get(["organs"], folder / "samples")
    source, images = sample / "images", folder / "scans"
    images.mkdir()
    for name in names:
        scan = nibabel.load(source / name)
        positions = np.linspace(0, scan.shape[2] - 1, count + 2).round().astype(int)[1:-1]
        nibabel.save(nibabel.Nifti1Image(np.asarray(scan.dataobj)[:, :, positions], scan.affine), images / name)
    return images


def write_checkpoint(
    architecture: str, path: Path, folder: Path, image_size: tuple[int, int] = IMAGE_SIZE
) -> Checkpoint:
    """Write a checkpoint of random weights, one class, and return it as it is read again.

    Args:
        architecture: a key of ``train.models.model.MODELS``.
        path: of ``model.pt``; the frozen block comes beside it.
        folder: of scans; the weights are set up on slices of the first.
        image_size: height and width in pixels.
    """
    spec = model_spec(architecture, image_size, 1)
    preprocessing = Preprocessing(
        image_size=image_size, window=RECIPES["organs-demo"]().preprocessing.window, spacing_mm=FIELD_MM / image_size[0]
    )
    block_file, digest, block = None, None, None
    if spec.block is not None:
        block, block_file = random_block(spec.block, SEED), path.with_name("drawn.safetensors")
        digest = save_block(block, block_file)
    images = _slices(folder, SHOWN, preprocessing)
    torch.manual_seed(SEED)
    model = build_model(spec, block)
    initialise(model, torch.from_numpy(images))
    checkpoint = Checkpoint(
        weights=trained_weights(model),
        spec=spec,
        preprocessing=preprocessing,
        classes=Classes(names=("background", "organ")),
        block_file=block_file,
        block_sha256=digest,
        provenance=Provenance(other={"initialization": f"random, seed {SEED}"}),
    )
    save_checkpoint(checkpoint, path)
    if block_file is not None:
        block_file.unlink()
    return load_checkpoint(path)


def _slices(folder: Path, count: int, preprocessing: Preprocessing) -> np.ndarray:
    """Return the first slices of the first scan, prepared as the network's input."""
    image = read_image(find_images([folder])[0])
    return np.stack([prepare(pixels, preprocessing, image.spacing_in_plane) for pixels in image.pixels[:count]])
