import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.save import PAGE_BYTES, save_graphs
from medseg_trt.export.graph.trace import OnnxGraph

WIDTH = 64
RNG = np.random.default_rng(0)
WEIGHTS = [RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32) for _ in range(4)]
X = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def chain(weights, bias=0.5, names="weight{}") -> OnnxGraph:
    """Return x @ weights[0] @ weights[1] … + bias."""
    value = source = ir.val("x", ir.DataType.FLOAT, ["batch", WIDTH])
    nodes, initializers = [], []
    for index, weight in enumerate((*weights, np.float32(bias))):
        name = names.format(index)
        initializers.append(ir.val(name, const_value=ir.tensor(weight, name=name)))
        nodes.append(ir.node("MatMul" if np.ndim(weight) else "Add", [value, initializers[-1]], name=f"node{index}"))
        value = nodes[-1].outputs[0]
        value.name, value.shape, value.dtype = f"value{index}", ir.Shape(["batch", WIDTH]), ir.DataType.FLOAT
    graph = ir.Graph([source], [value], nodes=nodes, initializers=initializers, opset_imports={"": 18}, name="chain")
    return OnnxGraph(model=ir.Model(graph, ir_version=10))


def holding(weight: np.ndarray) -> OnnxGraph:
    """Return a graph that holds one more tensor."""
    graph = chain(WEIGHTS[:0])
    graph.model.graph.register_initializer(ir.val("held", const_value=ir.tensor(weight, name="held")))
    return graph


class Scaled(torch.nn.Module):
    """``x`` with every row times one of ``weight``."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None] * self.weight


def external(path) -> dict[str, dict[str, str]]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}


@pytest.fixture
def saved(tmp_path):
    """Return the folder of two graphs; the second calls the same weights by other names, in another order."""
    first, second = WEIGHTS[:3], [copy.copy() for copy in WEIGHTS[2::-1]]
    save_graphs({"a.onnx": chain(first), "b.onnx": chain(second, names="w{}")}, tmp_path, "weights.bin")
    return tmp_path


def test_written_graphs_compute_the_same_outputs(saved):
    product = WEIGHTS[0] @ WEIGHTS[1] @ WEIGHTS[2] + np.float32(0.5)
    reverse = WEIGHTS[2] @ WEIGHTS[1] @ WEIGHTS[0] + np.float32(0.5)
    for name, matrix in (("a.onnx", product), ("b.onnx", reverse)):
        session = onnxruntime.InferenceSession(saved / name, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"x": X})
        # Sums of 64 products in float32, twice more than X @ matrix rounds: 3e-4 of 500 seen.
        np.testing.assert_allclose(np.asarray(output), X @ (matrix - np.float32(0.5)) + np.float32(0.5), atol=1e-2)


def test_a_shared_tensor_is_written_once_and_on_a_page(saved):
    first, second = external(saved / "a.onnx"), external(saved / "b.onnx")
    assert (saved / "weights.bin").stat().st_size == sum(weight.nbytes for weight in WEIGHTS[:3])
    offsets = [first[f"weight{index}"]["offset"] for index in range(3)]
    assert offsets == [second[f"w{2 - index}"]["offset"] for index in range(3)]
    assert {int(offset) % PAGE_BYTES for offset in offsets} == {0}
    assert {entry["location"] for entry in (*first.values(), *second.values()) if entry} == {"weights.bin"}
    assert first["weight3"] == {}  # a scalar stays in the graph


def test_equal_bytes_of_another_type_or_shape_are_other_tensors(tmp_path):
    codes = np.ones((WIDTH, WIDTH), np.float32)
    graphs = {"a.onnx": chain([codes]), "b.onnx": chain([codes])}
    value = ir.val("ints", const_value=ir.tensor(codes.view(np.int32), name="ints"))
    flat = ir.val("flat", const_value=ir.tensor(codes.ravel(), name="flat"))
    for added in (value, flat):
        graphs["b.onnx"].model.graph.register_initializer(added)
    save_graphs(graphs, tmp_path, "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == 3 * codes.nbytes


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.bfloat16, np.float16, np.int8])
def test_every_type_of_weight_is_read_back_unchanged(tmp_path, dtype):
    values = RNG.integers(-7, 8, (WIDTH, WIDTH)).astype(dtype)
    graph = chain(WEIGHTS[:1])
    graph.model.graph.register_initializer(ir.val("codes", const_value=ir.tensor(values, name="codes")))
    save_graphs({"a.onnx": graph}, tmp_path, "weights.bin")
    tensor = ir.load(tmp_path / "a.onnx").graph.initializers["codes"].const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    np.testing.assert_array_equal(tensor.numpy(), values)


def test_a_tensor_of_pytorch_is_the_same_tensor(tmp_path):
    weight = WEIGHTS[0][:, ::2]  # of another layout in memory, too
    example = (torch.ones(2, WIDTH // 2),)
    program = torch.onnx.export(Scaled(weight).eval(), example, dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    save_graphs({"a.onnx": OnnxGraph(model=program.model), "b.onnx": holding(weight.copy())}, tmp_path, "weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size == weight.size * 4
    tensor = ir.load(tmp_path / "a.onnx").graph.initializers["weight"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight)


def test_the_bytes_depend_on_the_graphs_alone(saved, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    graphs = {name: OnnxGraph(model=ir.load(saved / name)) for name in ("a.onnx", "b.onnx")}
    save_graphs(graphs, again, "weights.bin")  # read from another folder, the small tensors too
    for name in ("a.onnx", "b.onnx", "weights.bin"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_the_weights_are_never_in_memory_twice(tmp_path):
    weights = [np.full((WIDTH, 1 << 14), index, np.float32) for index in range(8)]  # 4 MiB each
    graph = chain(WEIGHTS[:1])
    for index, weight in enumerate(weights):
        value = ir.val(f"big{index}", const_value=ir.tensor(weight, name=f"big{index}"))
        graph.model.graph.register_initializer(value)
    tracemalloc.start()
    save_graphs({"a.onnx": graph}, tmp_path, "weights.bin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * weights[0].nbytes  # one tensor's bytes are hashed as a copy; eight would be 32 MiB


def test_a_graph_that_onnx_refuses_is_reported(tmp_path):
    graph = chain(WEIGHTS[:1])
    next(iter(graph.model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(MedsegError, match=r"ONNX refuses a\.onnx"):
        save_graphs({"a.onnx": graph}, tmp_path, "weights.bin")


@pytest.mark.parametrize(("name", "weights"), [("../a.onnx", "weights.bin"), ("a.onnx", "sub/weights.bin")])
def test_a_path_is_no_file_name(tmp_path, name, weights):
    with pytest.raises(MedsegError, match="plain file name"):
        save_graphs({name: chain(WEIGHTS[:1])}, tmp_path, weights)


def test_weights_that_are_there_already_are_not_overwritten(saved):
    before = (saved / "weights.bin").read_bytes()
    with pytest.raises(MedsegError, match="exists"):
        save_graphs({"c.onnx": chain(WEIGHTS)}, saved, "weights.bin")
    assert (saved / "weights.bin").read_bytes() == before
