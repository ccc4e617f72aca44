"""Plugins without a GPU: TensorRT-RTX parses and builds with them for other machines' cards; what runs is recorded.

An engine cannot be executed or even opened here. What ``enqueue`` would launch is compared with the kernel's
declaration through a recorded driver; the rest needs a card (``test_gpu.py``).
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from medseg_trt.errors import MedsegError
from medseg_trt.export.graph.functions import BODIES, DOMAIN, PLUGIN
from medseg_trt.kernels import cuda_bindings_adapter
from medseg_trt.kernels import plugin as plugin_module
from medseg_trt.kernels.kernel import float_bits
from medseg_trt.kernels.launch import Driver, Launch, Launcher
from medseg_trt.kernels.nodes import NODES
from medseg_trt.kernels.plugin import NodeCreator, NodePlugin, register

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'"
)

from gpu_free.plugin_engines import Log, block, build, int8_block, model, node, parse  # noqa: E402  # only where it is

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
NAMES = {"fp16": "Half", "bf16": "BFloat16", "fp32": "Float"}  # as TensorRT logs them


@pytest.fixture(scope="module")
def digests() -> Mapping[str, str]:
    return register(trt)


def test_every_node_is_registered_once(digests):
    assert register(trt) == digests == {name: creator.digest for name, creator in NODES.items()}
    creators = [creator for creator in trt.get_plugin_registry().all_creators if creator.plugin_namespace == DOMAIN]
    assert sorted(creator.name for creator in creators) == sorted(BODIES)
    assert {creator.plugin_version for creator in creators} == {PLUGIN["plugin_version"]}


@pytest.mark.parametrize("precision", TYPES)
def test_an_engine_for_two_cards_has_every_node_as_a_layer_of_ours(precision, digests):
    plan, log = build(block(TYPES[precision]))
    assert len(plan) > 1000
    layers = log.layers()
    ours = {name: line for name, line in layers.items() if "LayerType: custom_layer" in line}
    line_of_node = {re.sub(r"_myl.*", "", name): line for name, line in ours.items()}
    assert sorted(line_of_node) == ["my_AddRMSNorm", "my_RMSNorm", "my_Rotary", "my_SwiGLU"]
    for name, line in line_of_node.items():
        inputs, outputs = line.split("Outputs:")
        assert f"[ONNX Layer: {name}]" in line
        assert set(re.findall(r"Datatype: (\w+)", outputs)) == {NAMES[precision]}
        assert "Row major linear" in inputs
    shapes = re.findall(r"Dimensions: \[([-\d,]+)\]", line_of_node["my_Rotary"].split("Outputs:")[1])
    assert shapes == ["-1,2,5,16", "-1,1,5,16", "-1,1,5,16"]
    assert re.findall(r"Dimensions: \[([-\d,]+)\]", line_of_node["my_SwiGLU"].split("Outputs:")[1]) == ["-1,5,32"]


def test_quantised_nodes_feed_int8_products(digests):
    _, log = build(int8_block(TensorProto.FLOAT16))
    layers = log.layers().values()
    ours = [line for line in layers if "custom_layer" in line]
    assert len(ours) == 4
    for line in ours:
        assert re.findall(r"Datatype: (\w+)", line.split("Outputs:")[1])[0] == "Int8"
    products = [line for line in layers if "LayerType: gemm" in line]
    read = [re.findall(r"Datatype: (\w+)", line.split("Outputs:")[0])[0] for line in products]
    assert read == ["Int8"] * 4


def test_a_node_of_another_version_is_computed_by_its_body(digests):
    _, log = build(block(TensorProto.FLOAT16, plugin_version="2"))
    ours = [name for name, line in log.layers().items() if "custom_layer" in line]
    assert len(ours) == 3
    assert not any("AddRMSNorm" in name for name in ours)


@pytest.mark.parametrize(
    ("graph", "line"),
    [
        (block(TensorProto.FLOAT16, weight=63), "medseg.AddRMSNorm: weight has shape (63,); it must be (64,)"),
        (
            block(TensorProto.FLOAT16, table=TensorProto.FLOAT16),
            "medseg.Rotary: cos is float16; beside qkv in float16 it must be float32",
        ),
        (
            model([node("SwiGLU", ["x"], ["y"])], {"x": (TensorProto.INT32, [2, 64])}, {"y": TensorProto.INT32}, {}),
            "medseg.SwiGLU takes float16, bfloat16, float32, not INT32",
        ),
        (
            model([node("SwiGLU", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [2, 63])}, {"y": TensorProto.FLOAT}, {}),
            "medseg.SwiGLU: gate_up has shape (2, 63); it must be (2, 62)",
        ),
        (
            model(
                [node("RMSNorm", ["x", "w"], ["y"])],
                {"x": (TensorProto.FLOAT, [2, 64])},
                {"y": TensorProto.FLOAT},
                {"w": (TensorProto.FLOAT, np.ones(64))},
            ),
            "medseg.RMSNorm my_RMSNorm has no attribute epsilon",
        ),
    ],
)
def test_parser_refuses_unsupported_plugin_nodes_in_one_line(graph, line, digests, capfd):
    _, _, parsed = parse(graph, Log())
    assert not parsed
    assert line in "".join(capfd.readouterr())


def no_launcher() -> Launcher:
    raise AssertionError("nothing runs here")


def creator(name: str, launcher: Callable[[], Launcher] = no_launcher) -> NodeCreator:
    """Return a creator of our own, which is not registered."""
    plugin, make = plugin_module._classes(trt)
    return make(trt, NODES[name], plugin, launcher)


STORED: list[np.ndarray] = []  # a field points into its array, and keeps it not


def fields(**values: float) -> Any:
    kinds = {float: (np.float32, trt.PluginFieldType.FLOAT32), int: (np.int32, trt.PluginFieldType.INT32)}
    plugin_fields: list[Any] = []
    for name, value in values.items():
        dtype, kind = kinds[type(value)]
        STORED.append(np.array([value], dtype))
        plugin_fields.append(trt.PluginField(name, STORED[-1], kind))
    return trt.PluginFieldCollection(plugin_fields)


ROTARY = {"num_heads": 2, "num_kv_heads": 1, "interleaved": 1}


def test_what_is_serialised_makes_the_same_plugin():
    maker = creator("Rotary")
    first = maker.create_plugin("rotary", fields(**ROTARY), trt.TensorRTPhase.BUILD)
    again = maker.create_plugin("rotary", first.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.attributes == first.attributes == ROTARY
    assert {entry.name for entry in again.entries.values()} == {
        f"rotary_{dtype}_interleaved_table" for dtype in ("float16", "bfloat16", "float32")
    }
    norm = creator("QuantizedRMSNorm").create_plugin("norm", fields(epsilon=1e-6, scale=0.03), trt.TensorRTPhase.BUILD)
    stored = {field.name: field.data[0] for field in norm.get_fields_to_serialize()}
    assert {name: float_bits(float(value)) for name, value in stored.items()} == {
        "epsilon": float_bits(1e-6),
        "scale": float_bits(0.03),
    }


def tensor(shape: tuple[int, ...], kind: str, memory_format: str = "LINEAR") -> Any:
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format = (
        trt.Dims(shape),
        getattr(trt.DataType, kind),
        getattr(trt.TensorFormat, memory_format),
    )
    return desc


def dynamic(desc: Any) -> Any:
    descriptor = trt.DynamicPluginTensorDesc()
    descriptor.desc = desc
    return descriptor


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("HALF FLOAT FLOAT HALF HALF HALF", [True] * 6),
        ("FLOAT FLOAT FLOAT FLOAT FLOAT FLOAT", [True] * 6),
        ("HALF HALF FLOAT HALF FLOAT HALF", [True, False, True, True, False, True]),
        ("INT8 FLOAT FLOAT INT8 INT8 INT8", [False] * 6),
    ],
)
def test_types_are_negotiated_as_the_kernel_declares_them(kinds, expected):
    rotary = creator("Rotary").create_plugin("rotary", fields(**ROTARY), trt.TensorRTPhase.BUILD)
    tensors = [dynamic(tensor((1, 1, 1), kind)) for kind in kinds.split()]
    assert [rotary.supports_format_combination(index, tensors, 3) for index in range(6)] == expected


def test_only_row_major_tensors_are_taken():
    swiglu = creator("SwiGLU").create_plugin("swiglu", fields(), trt.TensorRTPhase.BUILD)
    rows, channels = dynamic(tensor((1, 8, 4), "HALF")), dynamic(tensor((1, 8, 4), "HALF", "CHW4"))
    assert [swiglu.supports_format_combination(1, [rows, other], 1) for other in (rows, channels)] == [True, False]
    assert not swiglu.supports_format_combination(0, [channels, rows], 1)


class Recorded(Driver):
    """A driver that keeps what it is asked to launch."""

    capability, cuda = 86, (13, 0)

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def load(self, ptx: str, symbol: str) -> Any:
        return symbol

    def unload(self) -> None:
        raise AssertionError("a plugin unloads nothing")

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def synchronize(self, stream: Any) -> None:
        raise AssertionError("a plugin never waits")


def attached(name: str, driver: Recorded, **attributes: float) -> NodePlugin:
    maker = creator(name, lambda: Launcher(driver, lambda *_: "ptx"))
    plugin = maker.create_plugin(name, fields(**attributes), trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None)


def test_enqueue_launches_the_kernel_in_the_stream():
    driver = Recorded()
    rotary = attached("Rotary", driver, **ROTARY)
    inputs = [tensor((3, 5, 64), "HALF"), tensor((5, 8), "FLOAT"), tensor((5, 8), "FLOAT")]
    outputs = [tensor((3, heads, 5, 16), "HALF") for heads in (2, 1, 1)]
    rotary.set_tactic(0)
    rotary.on_shape_change(inputs, outputs)
    sources, targets = (0x100000, 0x200000, 0x300000), (0x400000, 0x500000, 0x600000)
    rotary.enqueue(inputs, outputs, sources, targets, 0, 0x77)
    (launch,) = driver.launches
    assert launch.function == "medseg_rotary_float16_interleaved_table"
    assert (launch.grid, launch.block, launch.shared_bytes, launch.stream) == ((15, 1, 1), (128, 1, 1), 0, 0x77)
    assert launch.layout == "PPP" + 7 * "i" + "PPP"
    assert launch.arguments == (*sources, 3, 5, 0, 2, 1, 16, 1, *targets)


def test_enqueue_of_a_quantised_node_passes_the_bits_of_its_floats():
    driver = Recorded()
    norm = attached("QuantizedAddRMSNorm", driver, epsilon=1e-6, scale=0.03)
    x = tensor((4, 5, 64), "BF16")
    norm.enqueue(
        [x, x, tensor((64,), "BF16")], [tensor((4, 5, 64), "INT8"), x], (2**20, 2**21, 2**22), (2**23, 2**24), 0, 1
    )
    (launch,) = driver.launches
    assert launch.function == "medseg_add_rmsnorm_bfloat16_int8"
    assert launch.arguments[3:7] == (20, 64, float_bits(1e-6), float_bits(0.03))


def test_plugins_of_two_contexts_share_no_module():
    drivers: list[Recorded] = []

    def launcher() -> Launcher:
        drivers.append(Recorded())
        return Launcher(drivers[-1], lambda *_: "ptx")

    plugin = creator("SwiGLU", launcher).create_plugin("swiglu", fields(), trt.TensorRTPhase.RUNTIME)
    contexts = [plugin.attach_to_context(None), plugin.attach_to_context(None)]
    assert drivers == []  # no device is opened before something runs
    for other in (*contexts, *contexts):
        other.enqueue([tensor((2, 8), "HALF")], [tensor((2, 4), "HALF")], (2**20,), (2**21,), 0, 0)
    assert [len(other.launches) for other in drivers] == [2, 2]


def test_shapes_that_change_to_wrong_ones_are_refused_before_a_launch():
    norm = attached("RMSNorm", Recorded(), epsilon=1e-6)
    with pytest.raises(ValueError, match=r"medseg\.RMSNorm: weight has shape \(64,\); it must be \(32,\)"):
        norm.on_shape_change([tensor((2, 32), "HALF"), tensor((64,), "HALF")], [tensor((2, 32), "HALF")])


def classic(creators: list[Any]) -> ModuleType:
    """Return a stand-in for ``tensorrt``: the classes of TensorRT-RTX, and a registry that keeps a list."""

    class Registry:
        all_creators = creators

        def register_creator(self, creator: Any, namespace: str) -> bool:
            assert namespace == DOMAIN
            self.all_creators.append(creator)
            return True

    module = ModuleType("tensorrt")
    module.__dict__.update({name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")})
    module.__dict__["get_plugin_registry"] = Registry
    return module


def test_classic_tensorrt_goes_the_same_way():
    creators: list[Any] = []
    assert register(classic(creators)) == register(classic(creators))
    assert [creator.name for creator in creators] == list(NODES)


def test_a_plugin_launches_on_the_gpu_that_its_engine_runs_on(monkeypatch):
    opened: list[int | None] = []

    def open_device(device: int | None) -> Recorded:
        opened.append(device)
        return Recorded()

    monkeypatch.setattr(cuda_bindings_adapter, "open_device", open_device)
    creators: list[Any] = []
    register(classic(creators), lambda *_: "ptx")
    maker = next(creator for creator in creators if creator.name == "SwiGLU")
    plugin = maker.create_plugin("swiglu", fields(), trt.TensorRTPhase.RUNTIME).attach_to_context(None)
    plugin.enqueue([tensor((2, 8), "HALF")], [tensor((2, 4), "HALF")], (2**20,), (2**21,), 0, 0)
    assert opened == [None]  # the context of TensorRT's thread, not that of the first GPU


def test_somebody_elses_plugin_of_that_name_is_an_error():
    other = creator("SwiGLU")
    other.digest = "0" * 64
    with pytest.raises(MedsegError, match=r"another plugin medseg\.SwiGLU is registered already"):
        register(classic([other]))


PARSE = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from medseg_trt.kernels import plugin
if len(sys.argv) > 2:
    plugin.link_parser = lambda trt: None
plugin.register(trt)
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(0)
print("parsed", trt.OnnxParser(network, logger).parse(Path(sys.argv[1]).read_bytes()), flush=True)
"""


def child(graph: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PARSE, graph, *more], capture_output=True, text=True, check=False)


def test_tensorrt_rtx_parser_link_works_without_writing_files(tmp_path):
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(block(TensorProto.FLOAT16))
    libraries = find_spec("tensorrt_rtx_libs")  # to import it loads all of them, which has ended this process
    if libraries is None or libraries.origin is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")
    folder = Path(libraries.origin).parent
    before = sorted(folder.iterdir())
    done = child(graph)
    assert (done.returncode, done.stdout) == (0, "parsed True\n"), done.stderr
    assert sorted(folder.iterdir()) == before


def test_without_the_alias_the_parser_ends_the_process(tmp_path):
    """If this fails, TensorRT-RTX has mended it, and ``parser_link.py`` can go."""
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(block(TensorProto.FLOAT16))
    done = child(graph, "no link")
    assert done.returncode != 0
    assert "parsed" not in done.stdout
