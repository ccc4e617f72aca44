"""The kernels as TensorRT plugins, written in Python: one code path for TensorRT-RTX and classic TensorRT.

Shapes, types and formats follow from the node (``nodes.py``); ``launch.py`` launches into TensorRT's stream. An engine
with these plugins needs this package, and a call of ``register``, on the machine that runs it.
Source: TensorRT, ``IPluginV3`` and ``IPluginCreatorV3One``.
"""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from medseg_trt.errors import MedsegError
from medseg_trt.kernels.kernel import Entry
from medseg_trt.kernels.launch import Driver, Launcher, open_current_driver
from medseg_trt.kernels.library import FindPtx, compile_here
from medseg_trt.kernels.nodes import NAMESPACE, NODES, VERSION, Attributes, Node, split
from medseg_trt.kernels.parser_link import link_parser

TYPES: Mapping[str, str] = {  # NumPy -> TensorRT's DataType
    "float16": "HALF",
    "bfloat16": "BF16",
    "float32": "FLOAT",
    "int8": "INT8",
    "float8_e4m3": "FP8",
}
FIELD_TYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "int32": np.int32}


def register(
    trt: ModuleType, find_ptx: FindPtx = compile_here, driver: Callable[[], Driver] = open_current_driver
) -> Mapping[str, str]:
    """Register a plugin for every node of ``NODES`` with a TensorRT library, and return the digests.

    Further calls keep the registered plugins, with their first ``find_ptx``.

    Args:
        trt: the module ``tensorrt_rtx`` or ``tensorrt`` (10.3 and newer).
        find_ptx: returns the PTX when a plugin runs; building does not need it.
        driver: opens the device when a plugin first runs.

    Raises:
        MedsegError: another plugin of one of these names is registered already.
    """
    link_parser(trt)
    registry = trt.get_plugin_registry()
    registered = {
        creator.name: creator
        for creator in registry.all_creators
        if (creator.plugin_namespace, creator.plugin_version) == (NAMESPACE, VERSION)
    }
    digests = {name: node.digest for name, node in NODES.items()}
    plugin, creator = _classes(trt)
    for name, node in NODES.items():
        if name not in registered:
            registry.register_creator(creator(trt, node, plugin, lambda: Launcher(driver(), find_ptx)), NAMESPACE)
        elif getattr(registered[name], "digest", "") != digests[name]:
            raise MedsegError(f"another plugin {NAMESPACE}.{name} is registered already; build in a process of its own")
    return digests


def data_type(trt: ModuleType, dtype: str) -> Any:
    """Return TensorRT's name of a type."""
    return getattr(trt.DataType, TYPES[dtype])


def dtype_name(kind: Any) -> str:
    """Return the NumPy name of a TensorRT type; TensorRT's own name for other types."""
    return next((ours for ours, theirs in TYPES.items() if theirs == kind.name), str(kind.name))


class NodePlugin:
    """One node of a network; together with TensorRT's base classes it is an ``IPluginV3``."""

    def __init__(self, trt: ModuleType, node: Node, attributes: Attributes, launcher: Callable[[], Launcher]) -> None:
        """Describe a node.

        Args:
            trt: the library that the plugin is for.
            node: what it computes.
            attributes: of the node, all of them.
            launcher: creates the launcher in the CUDA context of the calling thread.
        """
        for base in _bases(trt):
            base.__init__(self)
        self.trt, self.node, self.attributes = trt, node, attributes
        self.plugin_name, self.plugin_namespace, self.plugin_version = node.name, NAMESPACE, VERSION
        self.entries = node.entries(attributes)
        read, written = split(next(iter(self.entries.values())))  # the names are the same for every type
        self.arrays = [parameter.name for parameter in (*read, *written)]
        self.num_outputs = len(written)
        self._make_launcher = launcher
        self._launcher: Launcher | None = None
        self._stored: dict[str, np.ndarray] = {}

    def get_capability_interface(self, kind: Any) -> "NodePlugin":
        """Return the object that implements a capability: this one implements all."""
        return self

    def clone(self) -> "NodePlugin":
        """Return a copy that shares no mutable state."""
        return type(self)(self.trt, self.node, self.attributes, self._make_launcher)

    def attach_to_context(self, context: Any) -> "NodePlugin":
        """Return the plugin of one execution context, which loads its kernel in that context."""
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        """Return the attributes, from which a plan restores the plugin."""
        kinds = self.node.attributes
        self._stored = {name: np.array([self.attributes[name]], FIELD_TYPES[kind]) for name, kind in kinds.items()}
        types = {"float32": self.trt.PluginFieldType.FLOAT32, "int32": self.trt.PluginFieldType.INT32}
        return self.trt.PluginFieldCollection(  # a field points into its array, so the array is kept
            [self.trt.PluginField(name, value, types[kinds[name]]) for name, value in self._stored.items()]
        )

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types.

        Raises:
            ValueError: no kernel takes inputs of these types.
        """
        entry = self.node.entry(dtype_name(input_types[0]), self.attributes)
        read, written = split(entry)
        for parameter, input_type in zip(read, input_types, strict=True):
            if input_type != data_type(self.trt, parameter.dtype):
                raise ValueError(
                    f"{NAMESPACE}.{self.node.name}: {parameter.name} is {dtype_name(input_type)}; "
                    f"beside {read[0].name} in {read[0].dtype} it must be {parameter.dtype}"
                )
        return [data_type(self.trt, parameter.dtype) for parameter in written]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """Return expressions for the outputs' shapes.

        Raises:
            ValueError: the known dimensions of the inputs do not match each other.
        """
        shapes = _known_shapes(inputs)
        if shapes is not None:
            self.node.launch_scalars(next(iter(self.entries.values())), shapes, self.attributes)
        dims = [
            [_Expression(self.trt, builder, input_dims[axis]) for axis in range(len(input_dims))]
            for input_dims in inputs
        ]
        outputs = self.node.output_dims(dims, self.attributes, self.num_outputs)
        return [self.trt.DimsExprs([_unwrapped(builder, dim) for dim in shape]) for shape in outputs]

    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        """Return whether a tensor is row-major and of the kernel's type, given the tensors before it."""
        tensor, first = tensors[position].desc, tensors[0].desc
        if tensor.format != self.trt.TensorFormat.LINEAR or dtype_name(first.type) not in self.entries:
            return False
        read, written = split(self.entries[dtype_name(first.type)])
        return tensor.type == data_type(self.trt, (*read, *written)[position].dtype)

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Do nothing: shapes are checked elsewhere, because an error here would abort the process."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Check the shapes of the launches that follow.

        Raises:
            ValueError: the shapes do not match each other.
        """
        self._scalars(inputs)

    def set_tactic(self, tactic: int) -> None:
        """Do nothing: there is one tactic."""

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Enqueue the kernel; the first call loads it, which is not possible during a graph capture."""
        if self._launcher is None:
            self._launcher = self._make_launcher()
        entry, scalars = self._scalars(input_desc)
        arrays = dict(zip(self.arrays, (*inputs, *outputs), strict=True))
        self._launcher.launch(self.node.kernel, entry, arrays, scalars, stream)

    def _scalars(self, inputs: Sequence[Any]) -> tuple[Entry, dict[str, int]]:
        entry = self.node.entry(dtype_name(inputs[0].type), self.attributes)
        return entry, self.node.launch_scalars(entry, [tuple(tensor.dims) for tensor in inputs], self.attributes)


class NodeCreator:
    """Creates the plugins of one node; together with TensorRT's base class it is an ``IPluginCreatorV3One``."""

    def __init__(
        self, trt: ModuleType, node: Node, plugin: Callable[..., NodePlugin], launcher: Callable[[], Launcher]
    ) -> None:
        """Describe the plugins; ``plugin`` creates one from the arguments of ``NodePlugin``."""
        trt.IPluginCreatorV3One.__init__(self)
        types = {"float32": trt.PluginFieldType.FLOAT32, "int32": trt.PluginFieldType.INT32}
        self.name, self.plugin_namespace, self.plugin_version = node.name, NAMESPACE, VERSION
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField(name, np.empty(0, FIELD_TYPES[kind]), types[kind])
                for name, kind in node.attributes.items()
            ]
        )
        self.digest = node.digest
        self._trt, self._node, self._plugin, self._launcher = trt, node, plugin, launcher

    def create_plugin(self, name: str, fields: Any, phase: Any) -> NodePlugin:
        """Return the plugin of a node, from its attributes or from the fields of a plan.

        Raises:
            ValueError: an attribute is missing.
        """
        values = {field.name: field.data for field in fields}
        kinds = self._node.attributes
        if missing := [attribute for attribute in kinds if attribute not in values]:
            raise ValueError(f"{NAMESPACE}.{self._node.name} {name} has no attribute {', '.join(missing)}")
        convert = {"float32": float, "int32": int}
        attributes = {attribute: convert[kind](values[attribute][0]) for attribute, kind in kinds.items()}
        return self._plugin(self._trt, self._node, attributes, self._launcher)


def _classes(trt: ModuleType) -> tuple[Callable[..., NodePlugin], Callable[..., NodeCreator]]:
    """Combine the classes with the base classes of a library; their own methods come first."""
    return type("Plugin", (NodePlugin, *_bases(trt)), {}), type("Creator", (NodeCreator, trt.IPluginCreatorV3One), {})


def _bases(trt: ModuleType) -> tuple[type, ...]:
    return trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime


class _Expression:
    """A symbolic dimension of TensorRT that supports ``*`` and ``//``."""

    def __init__(self, trt: ModuleType, builder: Any, value: Any) -> None:
        self._trt, self._builder, self.value = trt, builder, value

    def __mul__(self, other: "_Expression | int") -> "_Expression":
        return self._combined("PROD", other)

    def __floordiv__(self, other: int) -> "_Expression":
        return self._combined("FLOOR_DIV", other)

    def _combined(self, operation: str, other: "_Expression | int") -> "_Expression":
        kind = getattr(self._trt.DimensionOperation, operation)
        value = self._builder.operation(kind, self.value, _unwrapped(self._builder, other))
        return _Expression(self._trt, self._builder, value)


def _unwrapped(builder: Any, dim: "_Expression | int") -> Any:
    return builder.constant(dim) if isinstance(dim, int) else dim.value


def _known_shapes(inputs: Sequence[Any]) -> list[list[int]] | None:
    """Return the shapes at network construction, with 1 for a dynamic batch; None if another axis is dynamic."""
    shapes = [[dims[axis] for axis in range(len(dims))] for dims in inputs]
    if not all(dim.is_constant() for shape in shapes for dim in shape[1:]):
        return None
    return [[int(dim.get_constant_value()) if dim.is_constant() else 1 for dim in shape] for shape in shapes]
