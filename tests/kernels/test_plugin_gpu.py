"""On a GPU: an engine with our plugins computes what the kernels' references say, layer by layer and as a whole."""

from typing import Any, cast

import numpy as np
import pytest

from medseg_trt.errors import DeviceError
from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.device_memory import DeviceArray, DeviceMemory
from medseg_trt.kernels.kernel import DTYPES, Array
from medseg_trt.kernels.launch import open_driver
from medseg_trt.kernels.nodes import NODES, split
from medseg_trt.kernels.plugin import register

pytestmark = pytest.mark.gpu
trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'"
)
BATCH, TOKENS, WIDTH = 3, 5, 64
DATA_TYPES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT"}


@pytest.fixture(scope="module")
def driver() -> CudaBindings:
    try:
        opened = cast("CudaBindings", open_driver("cuda-bindings"))
    except DeviceError as error:
        pytest.skip(str(error))
    if f"SM{opened.capability}" not in trt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT-RTX {trt.__version__} does not build for sm{opened.capability}")
    return opened


def execute(driver: CudaBindings, plan: bytes, inputs: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
    """Run an engine once in the default stream; ``outputs`` say types and shapes."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    with DeviceMemory(driver) as memory:
        arrays: dict[str, DeviceArray] = {name: memory.upload(value) for name, value in {**inputs, **outputs}.items()}
        for name, value in inputs.items():
            assert context.set_input_shape(name, value.shape)
        for name, array in arrays.items():
            assert context.set_tensor_address(name, array.address)
        assert context.execute_async_v3(0)
        return {name: memory.download(arrays[name]) for name in outputs}


@pytest.mark.parametrize("dtype", DATA_TYPES)
def test_an_engine_with_plugins_computes_what_the_references_say(dtype, driver):
    from gpu_free.plugin_engines import TensorProto, block, build

    register(trt)
    plan, _ = build(block(getattr(TensorProto, DATA_TYPES[dtype])), (f"SM{driver.capability}",))
    rng = np.random.default_rng(0)
    x, r = (rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(DTYPES[dtype]) for _ in range(2))
    shapes = {
        "q": (BATCH, 2, TOKENS, 16),
        "k": (BATCH, 1, TOKENS, 16),
        "v": (BATCH, 1, TOKENS, 16),
        "z": (BATCH, TOKENS, WIDTH // 2),
    }
    measured = execute(
        driver, plan, {"x": x, "r": r}, {name: np.zeros(shape, DTYPES[dtype]) for name, shape in shapes.items()}
    )

    ones, halves = np.ones(WIDTH, DTYPES[dtype]), np.ones(WIDTH // 2, DTYPES[dtype])
    norm, total = reference("AddRMSNorm", dtype, [x, r, ones], epsilon=1e-6)
    angles = np.ones((TOKENS, 8), np.float32), np.zeros((TOKENS, 8), np.float32)
    rotated = reference("Rotary", dtype, [norm, *angles], num_heads=2, num_kv_heads=1, interleaved=0)
    (product,) = reference("SwiGLU", dtype, [total])
    (last,) = reference("RMSNorm", dtype, [product, halves], epsilon=1e-6)
    # Every kernel is within one rounding of its reference; a norm hands an error of its input on as it is.
    limit = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 1e-5}[dtype]
    for name, expected in zip("qkvz", (*rotated, last), strict=True):
        actual, target = measured[name].astype(np.float64), expected.reshape(shapes[name]).astype(np.float64)
        np.testing.assert_allclose(actual, target, rtol=limit, atol=limit)


def reference(name: str, dtype: str, inputs: list[Array], **attributes: Any) -> list[Array]:
    """Return what a node makes of its inputs, in the types that it writes."""
    node = NODES[name]
    entry = node.entry(dtype, attributes)
    read, written = split(entry)
    scalars = node.launch_scalars(entry, [parameter.shape for parameter in inputs], attributes)
    shapes = node.kernel.shapes(scalars, entry)
    named = {
        parameter.name: value.reshape(shapes[parameter.name]) for parameter, value in zip(read, inputs, strict=True)
    }
    expected = node.kernel.reference(entry, named, scalars)
    lead = {"Rotary": (), "SwiGLU": (*inputs[0].shape[:-1], -1)}.get(name, inputs[0].shape)
    values = [expected[parameter.name].value.astype(DTYPES[parameter.dtype]) for parameter in written]
    return [value.reshape(lead) if lead else value for value in values]
