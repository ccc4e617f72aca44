"""The C++ plugins: what is generated, what is refused, and, with TensorRT's headers, the same launches as Python's.

NVIDIA ships the headers in no wheel; the tests marked ``network`` take them out of a package of somebody else's, or
from ``MEDSEG_TENSORRT_INCLUDE``.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from gpu_free import driver as fake

from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.kernels.kernel import float_bits
from medseg_trt.kernels.launch import pack
from medseg_trt.kernels.nodes import NAMESPACE, NODES, VERSION, split
from medseg_trt.kernels.plugin_library import INCLUDE, _literal, build_library, table

HEADERS = "kernel-lens==2.0.1"  # TensorRT 10.14.1's headers, 11 files
HARNESS = Path(__file__).parents[1] / "gpu_free" / "plugin_harness.cpp"
DATA_TYPES = {"float32": 0, "float16": 1, "int8": 2, "bfloat16": 7}  # as nvinfer1::DataType numbers them
ATTRIBUTES: Mapping[str, float] = {"epsilon": 1e-6, "scale": 0.03, "num_heads": 3, "num_kv_heads": 1, "interleaved": 1}


@pytest.fixture(scope="module")
def include(tmp_path_factory) -> Path:
    if os.environ.get(INCLUDE):
        return Path(os.environ[INCLUDE])
    folder = tmp_path_factory.mktemp("headers")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, HEADERS],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no package index has {HEADERS}: {done.stderr.strip().splitlines()[-1]}")
    return folder / "kernel_lens" / "include" / "tensorrt"


@pytest.fixture(scope="module")
def library(include, tmp_path_factory) -> Path:
    if fake.compiler() is None:
        pytest.skip("needs a C++ compiler: apt install g++")
    path = tmp_path_factory.mktemp("library") / "libmedseg_plugins.so"
    digest = build_library(path, ["sm_80", "sm_86"], include)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


def test_the_table_has_every_node_and_function():
    text = table(["sm_80"])
    assert f'NAMESPACE[] = "{NAMESPACE}", VERSION[] = "{VERSION}"' in text
    for node in NODES.values():
        assert f'{{"{node.name}", Rule::{node.rule}, ' in text
        for interleaved in range(2):
            for entry in node.entries({**ATTRIBUTES, "interleaved": interleaved}).values():
                assert text.count(f'"{entry.symbol}"') == 1
                assert text.count(f"char ptx_{entry.name}_80_13000[]") == 1
    assert '{"batch", "tokens"}' in text  # the grid of rotary


def test_a_long_text_is_cut_into_pieces_that_a_compiler_takes():
    text = "0123456789" * 15000
    pieces = _literal(text).split("\n")
    assert max(map(len, pieces)) < 65536
    assert "".join(piece.removeprefix('R"PTX(').removesuffix(')PTX"') for piece in pieces) == text


def test_build_library_refuses_missing_headers_and_unknown_architectures(tmp_path, monkeypatch):
    monkeypatch.delenv(INCLUDE, raising=False)
    with pytest.raises(UsageError, match=INCLUDE):
        build_library(tmp_path / "a.so", ["sm_80"])
    monkeypatch.setenv(INCLUDE, str(tmp_path))
    with pytest.raises(UsageError, match=r"has no NvInferRuntime\.h"):
        build_library(tmp_path / "a.so", ["sm_80"])
    with pytest.raises(UsageError, match="there is no architecture sm_99"):
        build_library(tmp_path / "a.so", ["sm_99"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(fake.compiler() is None, reason="needs a C++ compiler: apt install g++")
def test_build_library_failure_leaves_no_files(tmp_path):
    (tmp_path / "NvInferRuntime.h").write_text("#error not these\n")
    with pytest.raises(MedsegError, match=r"does not compile with the headers in .*not these"):
        build_library(tmp_path / "a.so", ["sm_80"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["NvInferRuntime.h"]


@pytest.mark.network
def test_plugin_library_build_is_reproducible(library, include, tmp_path):
    assert (
        build_library(tmp_path / "again.so", ["sm_86", "sm_80"], include)
        == hashlib.sha256(library.read_bytes()).hexdigest()
    )


@pytest.fixture(scope="module")
def harness(library, include, tmp_path_factory) -> Path:
    """Return a folder with the harness and a driver that executes nothing."""
    from medseg_trt.kernels.plugin_library import _cuda_headers

    folder = fake.build(tmp_path_factory.mktemp("harness"))
    includes = [f"-isystem{header}" for header in (include, *_cuda_headers())]
    subprocess.run(["g++", "-std=c++17", "-w", *includes, HARNESS, "-o", folder / "harness", "-ldl"], check=True)
    return folder


def drive(folder: Path, library: Path, name: str, dtype: str, shapes: list[tuple[int, ...]]) -> list[fake.Launched]:
    node = NODES[name]
    read = split(node.entry(dtype, ATTRIBUTES))[0]
    attributes = [f"{key}={ATTRIBUTES[key]:g}" for key in node.attributes]
    inputs = [
        f"{','.join(map(str, shape))}:{DATA_TYPES[parameter.dtype]}"
        for parameter, shape in zip(read, shapes, strict=True)
    ]
    return fake.run(folder, [folder / "harness", library, name, *attributes, *inputs])


SHAPES: Mapping[str, list[tuple[int, ...]]] = {
    "RMSNorm": [(2, 5, 60), (60,)],
    "AddRMSNorm": [(2, 5, 60), (2, 5, 60), (60,)],
    "SwiGLU": [(2, 5, 60)],
    "Rotary": [(2, 5, 60), (5, 6), (5, 6)],
    "QuantizedRMSNorm": [(7, 60), (60,)],
    "QuantizedAddRMSNorm": [(7, 60), (7, 60), (60,)],
    "QuantizedSwiGLU": [(7, 60)],
    "QuantizedLayerNorm": [(7, 60), (60,), (60,)],
}


@pytest.mark.network
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NODES)
def test_the_library_launches_what_python_launches(name, dtype, harness, library):
    node = NODES[name]
    entry = node.entry(dtype, ATTRIBUTES)
    arrays = [parameter.name for side in split(entry) for parameter in side]
    addresses = {array: (index + 1) << 20 for index, array in enumerate(arrays)}
    scalars = node.launch_scalars(entry, SHAPES[name], ATTRIBUTES)
    (launched,) = drive(harness, library, name, dtype, SHAPES[name])
    assert launched == fake.Launched(
        entry.symbol,
        node.kernel.grid(scalars),
        node.kernel.block,
        node.kernel.shared_bytes,
        7,
        pack(node.kernel, entry, addresses, scalars),
    )
    assert all(scalars[f"{key}_bits"] == float_bits(ATTRIBUTES[key]) for key in node.attributes if key == "epsilon")


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "shapes", "line"),
    [
        ("RMSNorm", [(2, 60), (59,)], "medseg.RMSNorm: input 1 has another shape than the first one asks for"),
        ("AddRMSNorm", [(2, 60), (3, 60), (60,)], "medseg.AddRMSNorm: input 1 has another shape"),
        ("SwiGLU", [(2, 61)], "medseg.SwiGLU: rows of 61 columns cannot be divided"),
        ("Rotary", [(2, 5, 60), (4, 6), (5, 6)], "medseg.Rotary: input 1 has another shape"),
        ("Rotary", [(2, 5, 55), (5, 5), (5, 5)], "medseg.Rotary: rows of 55 columns cannot be divided"),
        ("Rotary", [(5, 60), (5, 6), (5, 6)], "medseg.Rotary: wrong number of axes"),
    ],
)
def test_wrong_shapes_are_refused_with_a_line_in_the_log(name, shapes, line, harness, library):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        drive(harness, library, name, "float16", shapes)
    assert line in "".join(caught.value.__notes__)


LOAD = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from medseg_trt.kernels.parser_link import link_parser
library, graph = sys.argv[1:]
link_parser(trt)
registry = trt.get_plugin_registry()
assert registry.load_library(library)
logger = trt.Logger(trt.Logger.ERROR)
sizes = []
for embedded in ([], [library]):
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(Path(graph).read_bytes())
    plugins = [network.get_layer(i).name for i in range(network.num_layers)
               if network.get_layer(i).type == trt.LayerType.PLUGIN_V3]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 2
    for index, card in enumerate(("SM86", "SM89")):
        config.set_compute_capability(getattr(trt.ComputeCapability, card), index)
    config.plugins_to_serialize = embedded
    sizes.append(builder.build_serialized_network(network, config).nbytes)
print(len(plugins), sizes[1] - sizes[0])
"""


@pytest.mark.network
def test_tensorrt_rtx_loads_the_library_and_puts_it_into_a_plan(library, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    from medseg_trt.export.graph import functions

    nodes = [
        helper.make_node("SwiGLU", ["x"], ["y"], domain=NAMESPACE, **functions.PLUGIN),
        helper.make_node("RMSNorm", ["y", "w"], ["z"], domain=NAMESPACE, epsilon=1e-6, **functions.PLUGIN),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 64])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT16, None)],
        [helper.make_tensor("w", TensorProto.FLOAT16, [32], np.ones(32))],
    )
    bodies = [functions.ir.to_proto(functions.function(name)) for name in ("SwiGLU", "RMSNorm")]
    imports = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(NAMESPACE, 1)]
    onnx.save(helper.make_model(graph, functions=bodies, opset_imports=imports, ir_version=11), tmp_path / "g.onnx")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, library, tmp_path / "g.onnx"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plugins, grown = map(int, done.stdout.split())
    assert plugins == 2
    assert library.stat().st_size <= grown <= library.stat().st_size + 1024
