"""Make the networks of the CPU benchmarks, and the peers' graphs of the published, unfolded networks.

PyTorch exports and OpenVINO's NNCF quantises, with their defaults for the kind of network.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SLICES = 8  # of each scan: one calibrates, the other is judged
SCANS = ("ct_A.nii.gz", "ct_B.nii.gz")
OPSET = 18  # at 21 and above OpenVINO 2026.4 dies of native GroupNormalization
CONVOLUTIONAL = ("unet",)  # NNCF has other defaults for transformers
GEMM_TOKENS, GEMM_WIDTH, GEMM_LAYERS = 256, 4096, 4  # the language part's shapes
GEMM_MACS = GEMM_TOKENS * GEMM_WIDTH**2 * GEMM_LAYERS


def write_networks(folder: Path, architectures: Sequence[str], image_size: tuple[int, int]) -> None:
    """Write the scans, the checkpoints, the prepared images and PyTorch's logits of those that are judged."""
    from bench_cpu_network import image_folder, write_checkpoint

    from medseg_trt.building.reference_images import reference_images
    from medseg_trt.train.models.model import runner

    images = image_folder(folder, SCANS, SLICES)
    arrays: dict[str, np.ndarray] = {}
    for architecture in architectures:
        (folder / architecture).mkdir()
        checkpoint = write_checkpoint(architecture, folder / architecture / "model.pt", images, image_size)
        chosen = reference_images(checkpoint, images)
        assert chosen.calibration is not None
        arrays |= {"calibration": chosen.calibration, "judged": chosen.judged.inputs}
        run = runner(checkpoint.model())
        arrays[architecture] = np.concatenate([run(image[np.newaxis]) for image in arrays["judged"]])
        del run
    np.savez(folder / "images.npz", **arrays)  # pyright: ignore[reportArgumentType]  # no name is allow_pickle


def write_unfolded(folder: Path, architecture: str) -> None:
    """Write the published network as PyTorch exports it, with a free batch; OpenVINO's session fixes it at one image.

    At batch 1, PyTorch 2.13 cannot export the attention of one window.
    """
    import torch

    from medseg_trt.export.graph.trace import EXAMPLE_BATCH
    from medseg_trt.train.checkpoint import load_checkpoint

    model = load_checkpoint(folder / architecture / "model.pt").model()
    (folder / "peers").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(EXAMPLE_BATCH, 3, *model.spec.image_size),),
            str(folder / "peers" / "unfolded.onnx"),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["logits"],
            external_data=True,
            verbose=False,
        )


def write_nncf(folder: Path, architecture: str) -> None:
    """Write the published network in INT8 as OpenVINO's NNCF makes it after training, on the same images."""
    import nncf  # pyright: ignore[reportMissingImports]  # of the group bench, which the tests do without
    import openvino

    with np.load(folder / "images.npz") as file:
        images = file["calibration"]
    model = openvino.Core().read_model(str(folder / "peers" / "unfolded.onnx"))
    model.reshape({"pixel_values": [1, *images.shape[1:]]})
    rounded = nncf.quantize(
        model,
        nncf.Dataset([image[np.newaxis] for image in images]),
        model_type=None if architecture in CONVOLUTIONAL else nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(rounded, str(folder / "peers" / "int8.xml"), compress_to_fp16=False)


def write_gemm(folder: Path) -> None:
    """Write a chain of INT8 matrix products, whose rate is the limit for any network of such products."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, constants, value = [], [], "pixel_values"
    shape = [1, GEMM_TOKENS, GEMM_WIDTH]
    for layer in range(GEMM_LAYERS):
        arrays = {
            f"scale{layer}": np.array(4 / 255, np.float32),
            f"zero{layer}": np.array(128, np.uint8),
            f"weight{layer}": random.integers(-127, 128, (GEMM_WIDTH, GEMM_WIDTH), np.int8),
            f"weight_scale{layer}": np.full(GEMM_WIDTH, GEMM_WIDTH**-0.5 / 73, np.float32),
            f"weight_zero{layer}": np.zeros(GEMM_WIDTH, np.int8),
        }
        constants += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        scale, zero, weight, weight_scale, weight_zero = arrays
        product = "logits" if layer == GEMM_LAYERS - 1 else f"product{layer}"
        nodes += [
            helper.make_node("QuantizeLinear", [value, scale, zero], [f"codes{layer}"]),
            helper.make_node("DequantizeLinear", [f"codes{layer}", scale, zero], [f"rounded{layer}"]),
            helper.make_node("DequantizeLinear", [weight, weight_scale, weight_zero], [f"matrix{layer}"], axis=1),
            helper.make_node("MatMul", [f"rounded{layer}", f"matrix{layer}"], [product]),
        ]
        value = product
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]), folder / "gemm.onnx")
