"""Generated pictures, volumes, data folders and checkpoints, small enough for unit tests; none of a patient."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image

from medseg_trt.network_spec import NetworkSpec
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import TINY_LLAMA, build_model, model_spec
from medseg_trt.train.provenance import parse_provenance
from medseg_trt.train.recipes.recipes import Recipe, recipe

SIZE = (32, 32)
LESION = Classes(names=("background", "lesion"))
TWO_ORGANS = Classes(names=("background", "disc", "bar"))


def picture(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return a grey picture (height, width) uint8 with a bright disc and a darker bar, and its labels 0, 1, 2."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    radius = rng.uniform(0.15, 0.25) * min(size)
    centre = rng.uniform(0.35, 0.65, 2) * size
    labels = np.zeros(size, np.uint8)
    labels[:, : max(size[1] // 8, 1)] = 2
    labels[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2] = 1
    values = np.array([40, 200, 110])[labels] + rng.normal(0, 8, size)
    return values.clip(0, 255).astype(np.uint8), labels


def write_pictures(root: Path, count: int = 4, size: tuple[int, int] = SIZE) -> Path:
    """Write a data folder of PNG pictures with masks of 0 and 255, without ``dataset.json``, and return it."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels, labels = picture(index, size)
        PIL.Image.fromarray(pixels).save(root / "images" / f"case{index}.png")
        PIL.Image.fromarray((255 * (labels == 1)).astype(np.uint8)).save(root / "masks" / f"case{index}.png")
    return root


def write_volumes(root: Path, count: int = 2, slices: int = 5, size: tuple[int, int] = (36, 28)) -> Path:
    """Write a data folder of NIfTI volumes (RAS, 2 x 1.5 x 3 mm) with three labels and ``dataset.json``; return it."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pairs = [picture(100 * index + number, size) for number in range(slices)]
        for part, array in zip(("images", "masks"), zip(*pairs, strict=True), strict=True):
            write_nifti(root / part / f"scan{index}.nii.gz", np.stack(array).transpose(2, 1, 0)[::-1, ::-1])
    names = [{"image": f"scan{index}"} for index in range(count)]
    write_description(root, splits={"train": names[:-1], "val": names[-1:]})
    return root


def write_nifti(path: Path, values: np.ndarray, spacing_mm: Sequence[float] = (2.0, 1.5, 3.0)) -> Path:
    """Write values (x, y, z) as a NIfTI volume whose axes run right, anterior and superior."""
    volume = nibabel.Nifti1Image(np.ascontiguousarray(values), np.diag([*spacing_mm, 1.0]))
    nibabel.save(volume, path)
    return path


def write_description(root: Path, splits: Mapping[str, object], classes: Classes = TWO_ORGANS) -> None:
    """Write ``dataset.json``."""
    described = {"name": "generated", "classes": classes.names, "splits": splits, "note": "generated shapes"}
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


def tiny_spec(
    architecture: str = "llm-transunet-tiny", size: tuple[int, int] = SIZE, num_classes: int = 3
) -> NetworkSpec:
    """Return the spec of a network that runs in milliseconds."""
    return model_spec(architecture, size, num_classes)


def write_block(folder: Path, seed: int = 0) -> Path:
    """Write a random frozen block for ``llm-transunet-tiny`` and return its file."""
    path = folder / f"block{seed}.safetensors"
    save_block(random_block(TINY_LLAMA, seed=seed), path)
    return path


def tiny_changes(*changes: str) -> list[str]:
    """Return the changes that make the recipe ``folder`` a run of a second on generated data, and further ones."""
    return [
        "architecture=llm-transunet-tiny",
        f"preprocessing.image_size={list(SIZE)}",
        "train.epochs=3",
        "train.batch_size=2",
        "train.learning_rate=0.01",
        *changes,
    ]


def tiny_recipe(*changes: str) -> Recipe:
    """Return the recipe that ``tiny_changes`` make."""
    return recipe("folder", tiny_changes(*changes))


def train_and_kill(arguments: Sequence[str], signal: int, at_step: int) -> subprocess.CompletedProcess[str]:
    """Run ``medseg-trt train`` in a process of its own, which gets ``signal`` at training step ``at_step`` (from 0)."""
    import torch

    program = f"""
import os
import signal
from medseg_trt.cli import main
from medseg_trt.train import loop, runs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

def loss(*arguments, real=loop.segmentation_loss, steps=iter(range({at_step}))):
    if next(steps, None) is None:
        os.kill(os.getpid(), {int(signal)})
    return real(*arguments)

loop.segmentation_loss = loss
runs.draw_curve = lambda *_: None  # it takes longer than an epoch here
main()
"""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers of threads give other last bits
    command = [sys.executable, "-c", program, "train", *arguments]
    return subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False, timeout=120)


def make_checkpoint(
    folder: Path,
    *,
    classes: Classes = TWO_ORGANS,
    architecture: str = "llm-transunet-tiny",
    size: tuple[int, int] = SIZE,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write ``model.pt`` with random weights, BatchNorm statistics that matter, and a seeded random frozen block."""
    import torch

    spec = tiny_spec(architecture, size, classes.num_logits)
    block = random_block(TINY_LLAMA, seed=0, std=0.3) if spec.block is not None else None
    block_file, digest = None, None
    folder.mkdir(parents=True, exist_ok=True)
    if block is not None:
        block_file = folder / "block.safetensors"
        digest = save_block(block, block_file)
    torch.manual_seed(0)
    model = build_model(spec, block)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        model.get_parameter("position_embedding").normal_()
        for name, weight in model.named_parameters():
            if name.startswith(("bridge", "decoder", "head")) and weight.dim() == 4:
                torch.nn.init.kaiming_normal_(weight)  # the tokens' share would fade from stage to stage
    checkpoint = Checkpoint(
        weights=trained_weights(model),
        spec=spec,
        preprocessing=Preprocessing(image_size=size),
        classes=classes,
        block_file=block_file,
        block_sha256=digest,
        provenance=parse_provenance(provenance or {}, "the generated checkpoint"),
    )
    save_checkpoint(checkpoint, folder / "model.pt")
    return folder / "model.pt"
