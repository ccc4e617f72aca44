"""Full-size networks with seeded random weights and non-degenerate logits, and the images of the CPU benchmark.

With PyTorch's default initialisation, activations of the decoder shrink from layer to layer, and the logits have a
spread of only 0.003, too small for judging rounding. Here every convolution preserves the variance of its input (He et
al. 2015), the branches of the residual units are small compared with their inputs, as in trained networks (Goyal et al.
2017, §5.1, initialise them with zero), and the logits are centred with a spread of ``LOGIT_SPREAD``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medseg_trt.errors import require
from medseg_trt.imaging.images import find_images, read_image
from medseg_trt.imaging.preprocess import prepare
from medseg_trt.samples.catalogue import get
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import build_model, model_spec
from medseg_trt.train.models.transunet import StdConv2d, TransUNet
from medseg_trt.train.provenance import Provenance
from medseg_trt.train.recipes.recipes import RECIPES

IMAGE_SIZE = (256, 256)
SEED = 0
POSITION_STD = 0.02  # of the position embedding, as ViT starts
LOGIT_SPREAD = 1.0  # standard deviation over the pixels of real images; at 3, float32 itself is off by more than 1e-4
SHOWN = 4  # images on which the last layer is set up
RESIDUAL_SCALE = 0.1  # of the last norm of a residual unit
ARCHITECTURES = ("llm-transunet", "transunet")
PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, window=RECIPES["organs-demo"]().preprocessing.window, spacing_mm=1.5
)  # the field of view of the recipe for these scans, in twice as many pixels


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


def write_checkpoint(architecture: str, path: Path, folder: Path) -> Checkpoint:
    """Write a checkpoint of random weights, one class, and return it as it is read again.

    Args:
        architecture: a key of ``train.models.model.MODELS``.
        path: of ``model.pt``; the frozen block comes beside it.
        folder: of scans; the last layer is set up on slices of the first.
    """
    spec = model_spec(architecture, IMAGE_SIZE, 1)
    block_file, digest, block = None, None, None
    if spec.block is not None:
        block, block_file = random_block(spec.block, SEED), path.with_name("drawn.safetensors")
        digest = save_block(block, block_file)
    images = _slices(folder, SHOWN)
    torch.manual_seed(SEED)
    model = build_model(spec, block)
    assert isinstance(model, TransUNet)
    initialise(model, torch.from_numpy(images))
    checkpoint = Checkpoint(
        weights=trained_weights(model),
        spec=spec,
        preprocessing=PREPROCESSING,
        classes=Classes(names=("background", "organ")),
        block_file=block_file,
        block_sha256=digest,
        provenance=Provenance(other={"initialization": f"random, seed {SEED}"}),
    )
    save_checkpoint(checkpoint, path)
    if block_file is not None:
        block_file.unlink()
    return load_checkpoint(path)


def initialise(model: TransUNet, images: torch.Tensor) -> None:
    """Give the network weights with which numbers keep their size from the first layer to the last."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, StdConv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.GroupNorm) and name.endswith(".gn3"):
            nn.init.constant_(module.weight, RESIDUAL_SCALE)
    nn.init.normal_(model.position_embedding, std=POSITION_STD)
    with torch.no_grad():
        logits = model.eval()(images)
        model.head.weight *= LOGIT_SPREAD / logits.std()
        assert model.head.bias is not None
        model.head.bias -= model(images).median()


def _slices(folder: Path, count: int) -> np.ndarray:
    """Return the first slices of the first scan, prepared as the network's input."""
    image = read_image(find_images([folder])[0])
    return np.stack([prepare(pixels, PREPROCESSING, image.spacing_in_plane) for pixels in image.pixels[:count]])
