"""ONNX files as others export them: a real MONAI network, and tiny graphs with whatever a test wants wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny import picture

Axis = int | str


def write_onnx(
    path: Path,
    *,
    input_shape: Sequence[Axis] = ("batch", 1, 32, 32),
    output_shape: Sequence[Axis] = ("batch", 3, 32, 32),
    extra_nodes: Sequence[onnx.NodeProto] = (),
    output: str = "logits_of_conv",
    more_outputs: Sequence[str] = (),
    opset: int = 17,
    output_type: int = TensorProto.FLOAT,
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a network of one BatchNorm between two convolutions, and further nodes that read ``logits_of_conv``."""
    rng = np.random.default_rng(0)
    channels = next(axis for axis in (input_shape[1], input_shape[-1], 1) if axis in (1, 3))
    arrays = {
        "kernel0": rng.normal(size=(8, channels, 3, 3)),
        "kernel1": rng.normal(size=(3, 8, 3, 3)),
        "scale": rng.uniform(0.5, 1.5, 8),
        "shift": rng.normal(size=8),
        "mean": rng.normal(size=8),
        "variance": rng.uniform(0.5, 1.5, 8),
        **(constants or {}),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "kernel1"], ["logits_of_conv"], pads=[1, 1, 1, 1]),
        *extra_nodes,
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(input_shape))],
        [
            helper.make_tensor_value_info(output, output_type, list(output_shape)),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more_outputs),
        ],
        [
            numpy_helper.from_array(values.astype(np.int64 if values.dtype.kind == "i" else np.float32), name)
            for name, values in arrays.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def export_monai(path: Path, size: int = 32) -> Any:
    """Export MONAI's BasicUNet of one channel and two logits with PyTorch's exporter; return the network."""
    import torch
    from monai.networks.nets.basic_unet import BasicUNet

    torch.manual_seed(0)
    network = BasicUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        features=(8, 8, 16, 16, 16, 8),
        norm=("batch", {}),
        upsample="nontrainable",
    ).eval()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        pixels, _ = picture(0, (size, size))
        logits = network(torch.from_numpy(pixels / np.float32(255))[None, None])
        network.final_conv.bias[1] -= (logits[:, 1] - logits[:, 0]).median()  # both labels occur
    torch.onnx.export(
        network,
        (torch.zeros(2, 1, size, size),),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    return network
