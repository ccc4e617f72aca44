"""Ahead-of-time plugins against a stand-in for ``tensorrt.plugin``: it checks what TensorRT 10.9's Python layer checks.

TensorRT itself is not here. The stand-in follows NVIDIA's ``_validate.py``, ``_lib.py`` and ``_tensor.py``: signatures,
shapes first as fakes of a known rank, then as expressions, and which classes go where.
"""

import inspect
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_origin

import pytest

from medseg_trt.errors import MedsegError
from medseg_trt.kernels.kernel import float_bits
from medseg_trt.kernels.nodes import NODES, split
from medseg_trt.kernels.plugin_aot import register_ahead_of_time

DataType = Enum("DataType", "FLOAT HALF BF16 INT8 FP8 INT32")
ATTRIBUTES: dict[str, int | float] = {
    "epsilon": 1e-6,
    "scale": 0.03,
    "num_heads": 3,
    "num_kv_heads": 1,
    "interleaved": 1,
}


class ShapeExpr:
    """A dimension; a fake one has no value, and nothing but arithmetic can be done with it."""

    def __init__(self, value: Any = None) -> None:
        self.value: int | None = value.value if isinstance(value, ShapeExpr) else value

    def __mul__(self, other: Any) -> "ShapeExpr":
        return self._combined(other, lambda one, two: one * two)

    def __floordiv__(self, other: Any) -> "ShapeExpr":
        return self._combined(other, lambda one, two: one // two)

    def _combined(self, other: Any, work: Any) -> "ShapeExpr":
        assert isinstance(other, int | ShapeExpr)
        two = ShapeExpr(other).value
        return ShapeExpr(None if self.value is None or two is None else work(self.value, two))


class SymInt32(ShapeExpr):
    pass


class ShapeExprs(list[ShapeExpr]):
    @classmethod
    def from_tuple(cls, values: Any) -> "ShapeExprs":
        return cls(value if isinstance(value, ShapeExpr) else ShapeExpr(value) for value in values)


class SymIntExprs(list[SymInt32]):
    @classmethod
    def from_tuple(cls, values: Any) -> "SymIntExprs":
        assert all(isinstance(value, SymInt32) for value in values)  # TensorRT takes no other integers
        return cls(values)


@dataclass
class TensorDesc:
    shape_expr: ShapeExprs
    dtype: Any = None


@dataclass
class KernelLaunchParams:
    grid_x: Any = 1
    grid_y: Any = 1
    grid_z: Any = 1
    block_x: Any = 1
    block_y: Any = 1
    block_z: Any = 1
    shared_mem: Any = 0


@dataclass
class Registered:
    describe: Any
    tensors: list[str]
    attributes: dict[str, type]
    implement: Any = None


@dataclass
class Plugins:
    """The decorators ``register`` and ``aot_impl``."""

    known: dict[str, Registered] = field(default_factory=dict[str, Registered])

    def register(self, name: str) -> Any:
        def decorate(describe: Any) -> Any:
            signature = inspect.signature(describe)
            kinds = {key: parameter.annotation for key, parameter in signature.parameters.items()}
            tensors = [key for key, kind in kinds.items() if issubclass(kind, TensorDesc)]
            attributes = {key: kind for key, kind in kinds.items() if key not in tensors}
            assert [*kinds] == [*tensors, *attributes]  # tensors first
            assert set(attributes.values()) <= {int, float, str, bool, bytes}
            assert all(parameter.default is parameter.empty for parameter in signature.parameters.values())
            assert not {"outputs", "stream", "tactic"} & {*attributes}
            return_type = signature.return_annotation
            assert all(
                issubclass(parameter, TensorDesc)
                for parameter in (get_args(return_type) if get_origin(return_type) is tuple else [return_type])
            )
            self.known[name] = Registered(describe, tensors, attributes)
            return describe

        return decorate

    def aot_impl(self, name: str) -> Any:
        def decorate(implement: Any) -> Any:
            entry, signature = self.known[name], inspect.signature(implement)
            assert [*signature.parameters] == [*entry.tensors, *entry.attributes, "outputs", "tactic"]
            assert get_origin(signature.parameters["outputs"].annotation) is tuple
            assert signature.parameters["tactic"].annotation is int
            for key, kind in entry.attributes.items():
                assert signature.parameters[key].annotation is kind
            returned = get_args(signature.return_annotation)
            assert returned == (str, str, KernelLaunchParams, SymIntExprs)
            entry.implement = implement
            return implement

        return decorate


def stand_in(creators: list[Any] | None = None, *, aot: bool = True) -> tuple[ModuleType, Plugins]:
    plugins, module = Plugins(), ModuleType("tensorrt")
    classes = {
        class_.__name__: class_ for class_ in (ShapeExprs, SymInt32, SymIntExprs, TensorDesc, KernelLaunchParams)
    }
    decorators = {"register": plugins.register, **({"aot_impl": plugins.aot_impl} if aot else {})}
    module.__dict__.update(
        DataType=DataType,
        get_plugin_registry=lambda: SimpleNamespace(all_creators=creators or []),
        plugin=SimpleNamespace(**classes, **decorators),
    )
    return module, plugins


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "weight": [(60,)],
    "bias": [(60,)],
    "cos": [(5, 6)],
    "sin": [(5, 6)],
}
KINDS = {"float16": DataType.HALF, "bfloat16": DataType.BF16, "float32": DataType.FLOAT, "int8": DataType.INT8}


def find_ptx(kernel: Any, entry: Any, capability: int, cuda: Any) -> str:
    return f"{entry.name} for sm_{capability}, CUDA {cuda}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", NODES)
def test_ahead_of_time_plugin_launch_equals_the_launcher(name, dtype):
    module, plugins = stand_in()
    digests = register_ahead_of_time(module, 89, (13, 0), find_ptx)
    assert digests == {parameter: node.digest for parameter, node in NODES.items()}
    node, plugin = NODES[name], plugins.known[f"medseg::{name}"]
    attributes = {key: kind(ATTRIBUTES[key]) for key, kind in plugin.attributes.items()}
    entry = node.entry(dtype, attributes)
    read, written = split(entry)
    shapes = [SHAPES.get(parameter.name, [(2, 5, 60)])[0] for parameter in read]
    expected = node.launch_scalars(entry, shapes, attributes)

    fakes = [
        TensorDesc(ShapeExprs(ShapeExpr() for _ in shape), KINDS[parameter.dtype])
        for parameter, shape in zip(read, shapes, strict=True)
    ]
    outputs = plugin.describe(*fakes, **attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [parameter.dtype for parameter in outputs] == [KINDS[parameter.dtype] for parameter in written]

    tensors = [
        TensorDesc(ShapeExprs.from_tuple(shape), KINDS[parameter.dtype])
        for parameter, shape in zip(read, shapes, strict=True)
    ]
    outputs = plugin.describe(*tensors, **attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dims = node.output_dims(shapes, attributes, len(written))
    assert [[parameter.value for parameter in output.shape_expr] for output in outputs] == dims

    symbol, ptx, launch, extra = plugin.implement(*tensors, *attributes.values(), outputs, 0)
    assert (symbol, ptx) == (entry.symbol, f"{entry.name} for sm_89, CUDA (13, 0)")
    grid = [launch.grid_x, launch.grid_y, launch.grid_z]
    assert tuple(ShapeExpr(parameter).value for parameter in grid) == node.kernel.grid(expected)
    assert (launch.block_x, launch.block_y, launch.block_z) == node.kernel.block
    assert launch.shared_mem == node.kernel.shared_bytes
    names = [parameter.name for parameter in entry.parameters if parameter.kind == "int32"]
    assert [parameter.value for parameter in extra] == [expected[parameter] for parameter in names]
    if "epsilon" in attributes:
        assert float_bits(1e-6) in [parameter.value for parameter in extra]


def test_kernel_parameters_are_ordered_inputs_integers_outputs():
    """Inputs' addresses, then integers, then outputs' addresses: TensorRT knows no other order."""
    for node in NODES.values():
        for entry in node.entries({**ATTRIBUTES}).values():
            argument_places = [
                0
                if parameter.kind == "pointer" and parameter.direction == "in"
                else 1
                if parameter.kind == "int32"
                else 2
                for parameter in entry.parameters
            ]
            assert argument_places == sorted(argument_places)


def test_types_that_no_kernel_takes_are_refused():
    module, plugins = stand_in()
    register_ahead_of_time(module, 89, (13, 0), find_ptx)
    fake = [TensorDesc(ShapeExprs(ShapeExpr() for _ in range(rank)), DataType.HALF) for rank in (3, 2, 2)]
    with pytest.raises(ValueError, match=r"medseg\.Rotary: cos must be float32"):
        plugins.known["medseg::Rotary"].describe(*fake, num_heads=3, num_kv_heads=1, interleaved=0)
    fake[0].dtype = DataType.INT32
    with pytest.raises(ValueError, match=r"medseg\.SwiGLU takes float16, bfloat16, float32, not INT32"):
        plugins.known["medseg::SwiGLU"].describe(fake[0])


def test_ahead_of_time_registration_fails_without_support_or_with_name_clash():
    with pytest.raises(MedsegError, match=r"tensorrt has no ahead-of-time plugins; TensorRT 10\.9 has"):
        register_ahead_of_time(stand_in(aot=False)[0], 89, (13, 0))
    there = [SimpleNamespace(plugin_namespace="medseg", name="SwiGLU")]
    with pytest.raises(MedsegError, match="medseg plugins are registered already: SwiGLU"):
        register_ahead_of_time(stand_in(there)[0], 89, (13, 0))
