"""Train tiny networks of other packages for a moment, and export them as their users do: python FILE NAME DATA OUTPUT.

Runs in an environment that has these packages, not in that of the tests. DATA is a folder of ``tiny.write_pictures``.
"""

import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64
STEPS = 60
NNUNET_PLAN = {  # as nnU-Net's planner writes it for 2-D images, with fewer stages and features
    "n_stages": 4,
    "features_per_stage": [8, 16, 32, 64],
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": [[3, 3]] * 4,
    "strides": [[1, 1], [2, 2], [2, 2], [2, 2]],
    "n_conv_per_stage": [2] * 4,
    "n_conv_per_stage_decoder": [2] * 3,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def nnunet(data: Path, output: Path) -> None:
    """Export nnU-Net's PlainConvUNet of one channel and two logits with PyTorch's exporter."""
    plans = import_module("nnunetv2.utilities.get_network_from_plans")
    network = plans.get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        NNUNET_PLAN,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        1,
        2,
        deep_supervision=False,
    )
    _train(network, *_pictures(data), prepare=lambda images: (images - 0.25) / 0.25)
    torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 1, SIZE, SIZE),),
        output,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def semantic(data: Path, output: Path, classes: int = 2, dynamic: bool = True) -> None:
    """Export Ultralytics' semantic network: its file gives labels."""
    model = _ultralytics("yolo26n-sem.yaml", classes)
    images, labels = _pictures(data)
    _train(model.model, images.expand(-1, 3, -1, -1), labels)
    shutil.move(model.export(format="onnx", imgsz=SIZE, dynamic=dynamic, simplify=False), output)


def semantic_of_one_class(data: Path, output: Path) -> None:
    """Export the same with one logit."""
    semantic(data, output, classes=1)


def semantic_of_fixed_batch(data: Path, output: Path) -> None:
    """Export the same with Ultralytics' default of a batch of one."""
    semantic(data, output, dynamic=False)


def instances(_: Path, output: Path) -> None:
    """Export an untrained network of Ultralytics' task "segment": boxes and prototypes."""
    shutil.move(_ultralytics("yolo26n-seg.yaml", 2).export(format="onnx", imgsz=SIZE, simplify=False), output)


def older_instances(_: Path, output: Path) -> None:
    """Export an untrained YOLO11 of the same task, with free axes."""
    model = _ultralytics("yolo11n-seg.yaml", 2)
    shutil.move(model.export(format="onnx", imgsz=SIZE, dynamic=True, simplify=False), output)


def _ultralytics(name: str, classes: int) -> Any:
    package = import_module("ultralytics")
    package.settings.update({"sync": False})
    model = package.YOLO(name)
    network = type(model.model)(name, ch=3, nc=classes, verbose=False)
    network.names = {number: str(number) for number in range(classes)}
    network.args = model.model.args
    network.task = model.model.task
    model.model = network
    return model


def _pictures(data: Path) -> tuple[Tensor, Tensor]:
    """Return images (count, 1, SIZE, SIZE) of 0 to 1 and their labels (count, SIZE, SIZE), 0 and 1."""
    pairs = [
        [np.asarray(PIL.Image.open(data / part / path.name).resize((SIZE, SIZE))) for part in ("images", "masks")]
        for path in sorted((data / "images").glob("*.png"))
    ]
    images, masks = (torch.from_numpy(np.stack(arrays).astype(np.float32) / 255) for arrays in zip(*pairs, strict=True))
    return images[:, None], (masks > 0.5).long()


def _train(
    network: nn.Module, images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor] = lambda images: images
) -> None:
    """Take ``STEPS`` steps on all images; of a tuple of logits, the first is trained."""
    network.train()
    network.requires_grad_(True)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 0.2  # Ultralytics' 0.03 is for longer training
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for _ in range(STEPS):
        logits = network(prepare(images))
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")
        if logits.shape[1] == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
        else:
            loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"loss {float(loss.detach()):.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
