"""The networks of the CPU benchmark: full size, seeded random weights, answers that are not degenerate; and its images.

PyTorch's own start makes a decoder whose numbers shrink from layer to layer, so that rounding would be judged on next
to nothing. Here every convolution keeps the variance of what it gets (He et al. 2015), BatchNorm takes its statistics
from real images, and the last layer's answers are centred and have a spread of ``LOGIT_SPREAD``.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medseg_trt.preprocess import prepare
from medseg_trt.images import find_images, read_image
from medseg_trt.samples import fetch
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.model import build_model, model_spec
from medseg_trt.train.recipes import RECIPES
from medseg_trt.train.transunet import StdConv2d, TransUNet

IMAGE_SIZE = (256, 256)
SEED = 0
POSITION_STD = 0.02  # of the position embedding, as ViT starts
LOGIT_SPREAD = 3.0  # standard deviation over the pixels of real images: sigmoids between 0 and 1, not all at one half
BATCH_NORM_IMAGES = 4
SCANS = ("ct_A.nii.gz", "ct_B.nii.gz")  # of the organs sample; one calibrates, the other is judged
PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, window=RECIPES["organs-demo"]().preprocessing.window, spacing_mm=1.5
)  # the field of view of the recipe for these scans, in twice as many pixels


def image_folder(folder: Path) -> Path:
    """Make a folder with the scans, and no masks, and return it."""
    source, images = fetch("organs") / "images", folder / "scans"
    images.mkdir(exist_ok=True)
    for name in SCANS:
        link = images / name
        if not link.exists():
            link.symlink_to(source / name)
    return images


def slices(scan: Path, count: int) -> np.ndarray:
    """Return slices of a scan, evenly spread, prepared as the network's input."""
    (source,) = find_images([scan])
    image = read_image(source)
    places = np.linspace(0, len(image.pixels) - 1, count).round().astype(int)
    return np.stack([prepare(image.pixels[place], PREPROCESSING, image.spacing_in_plane) for place in places])


def write_checkpoint(architecture: str, path: Path, images: np.ndarray) -> Checkpoint:
    """Write a checkpoint of random weights, one class, and return it as it is read again.

    Args:
        architecture: a key of ``train.model.MODELS``.
        path: of ``model.pt``; the frozen block comes beside it.
        images: prepared; BatchNorm and the last layer are set up on the first few.
    """
    spec = model_spec(architecture, IMAGE_SIZE, 1)
    block_file, digest, block = None, None, None
    if spec.block is not None:
        block, block_file = random_block(spec.block, SEED), path.with_name("drawn.safetensors")
        digest = save_block(block, block_file)
    torch.manual_seed(SEED)
    model = build_model(spec, block)
    initialise(model, torch.from_numpy(images[:BATCH_NORM_IMAGES]))
    checkpoint = Checkpoint(
        weights=trained_weights(model), spec=spec, preprocessing=PREPROCESSING,
        classes=Classes(names=("background", "organ")), block_file=block_file, block_sha256=digest,
        provenance={"weights": f"random, seed {SEED}"},
    )  # fmt: skip
    save_checkpoint(checkpoint, path)
    if block_file is not None:
        block_file.unlink()
    return load_checkpoint(path)


def initialise(model: TransUNet, images: torch.Tensor) -> None:
    """Give the network weights with which numbers keep their size from the first layer to the last."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, StdConv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of all that is shown, equally weighted
    nn.init.normal_(model.position_embedding, std=POSITION_STD)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
        model(images)
        logits = model.eval()(images)
        model.head.weight *= LOGIT_SPREAD / logits.std()
        assert model.head.bias is not None
        model.head.bias -= model(images).median()
    for norm in norms:
        norm.momentum = nn.BatchNorm2d(1).momentum
