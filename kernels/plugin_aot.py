"""The kernels as ahead-of-time plugins of classic TensorRT (10.9 and newer), with the PTX in the plan.

An engine with these plugins needs neither Python nor a plugin library. At build time TensorRT asks for the PTX, the
number of blocks and the integer arguments, which it passes between the addresses of inputs and outputs: the argument
order of every kernel. TensorRT-RTX has no such plugins.
Source: TensorRT, "Quickly deployable plugins", ``tensorrt.plugin``. This module has not been executed: it needs classic
TensorRT on a GPU.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

from medseg_trt.errors import MedsegError
from medseg_trt.kernels.library import FindPtx, Release, compile_here
from medseg_trt.kernels.nodes import NAMESPACE, NODES, Node, split
from medseg_trt.kernels.plugin import data_type, dtype_name

ATTRIBUTE_TYPES: Mapping[str, type[float | int]] = {"float32": float, "int32": int}


def register_ahead_of_time(
    trt: ModuleType, capability: int, cuda: Release, find_ptx: FindPtx = compile_here
) -> Mapping[str, str]:
    """Register a plugin for every node of ``NODES`` with TensorRT, and return the digests.

    Do not use this and ``plugin.register`` in one process: the plugins have the same names.

    Args:
        trt: the module ``tensorrt``, whose sub-module ``plugin`` is imported.
        capability: of the engine's device, 86 for sm_86.
        cuda: the newest CUDA release that the device's driver supports.
        find_ptx: returns the PTX.

    Raises:
        MedsegError: this TensorRT has no ahead-of-time plugins, or plugins of these names are registered already.
    """
    plugin: Any = getattr(trt, "plugin", None)
    if not hasattr(plugin, "aot_impl"):
        raise MedsegError(f"{trt.__name__} has no ahead-of-time plugins; TensorRT 10.9 has. Use plugin.register")
    creators = trt.get_plugin_registry().all_creators
    if registered := sorted(
        {creator.name for creator in creators if creator.plugin_namespace == NAMESPACE} & NODES.keys()
    ):
        raise MedsegError(
            f"{NAMESPACE} plugins are registered already: {', '.join(registered)}; use a process of its own"
        )

    def ptx_for(node: Node, entry_name: str) -> str:
        return find_ptx(node.kernel, node.kernel.entry(entry_name), capability, cuda)

    for node in NODES.values():
        name = f"{NAMESPACE}::{node.name}"
        plugin.register(name)(_describe(trt, plugin, node))
        plugin.aot_impl(name)(_implement(plugin, node, ptx_for))
    return {name: node.digest for name, node in NODES.items()}


def _describe(trt: ModuleType, plugin: Any, node: Node) -> Callable[..., Any]:
    """Return the function that describes the outputs; TensorRT reads argument names and types from its signature."""
    number = len(_names(node)[1])

    def describe(*tensors: Any, **attributes: Any) -> Any:
        entry = node.entry(dtype_name(tensors[0].dtype), attributes)
        read, written = split(entry)
        for parameter, tensor in zip(read, tensors, strict=True):
            if tensor.dtype != data_type(trt, parameter.dtype):
                raise ValueError(f"{NAMESPACE}.{node.name}: {parameter.name} must be {parameter.dtype}")
        shapes = node.output_dims([list(tensor.shape_expr) for tensor in tensors], attributes, number)
        outputs = tuple(
            plugin.TensorDesc(plugin.ShapeExprs.from_tuple(tuple(shape)), dtype=data_type(trt, parameter.dtype))
            for shape, parameter in zip(shapes, written, strict=True)
        )
        return outputs if number > 1 else outputs[0]

    return_type = tuple[(plugin.TensorDesc,) * number] if number > 1 else plugin.TensorDesc
    describe.__signature__ = Signature(_parameters(plugin, node), return_annotation=return_type)
    return describe


def _implement(plugin: Any, node: Node, ptx_for: Callable[[Node, str], str]) -> Callable[..., Any]:
    """Return the function that describes the launch: the kernel's name, PTX, blocks, threads and integer arguments."""
    read, written = _names(node)

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        tensors, values = arguments[: len(read)], arguments[len(read) : -2]  # outputs and tactic follow
        attributes = dict(zip(node.attributes, values, strict=True))
        entry = node.entry(dtype_name(tensors[0].dtype), attributes)
        scalars = node.arguments([list(tensor.shape_expr) for tensor in tensors], attributes)
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = node.kernel.grid(scalars)
        launch.block_x, launch.block_y, launch.block_z = node.kernel.block
        launch.shared_mem = node.kernel.shared_bytes
        integers = [scalars[parameter.name] for parameter in entry.parameters if parameter.kind == "int32"]
        extra = plugin.SymIntExprs.from_tuple(tuple(plugin.SymInt32(number) for number in integers))
        return entry.symbol, ptx_for(node, entry.name), launch, extra

    outputs = Parameter(
        "outputs", Parameter.POSITIONAL_OR_KEYWORD, annotation=tuple[(plugin.TensorDesc,) * len(written)]
    )
    tactic = Parameter("tactic", Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
    implement.__signature__ = Signature(
        [*_parameters(plugin, node), outputs, tactic],
        return_annotation=tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs],
    )
    return implement


def _names(node: Node) -> tuple[list[str], list[str]]:
    read, written = split(node.entry("float32", dict.fromkeys(node.attributes, 0)))
    return [parameter.name for parameter in read], [parameter.name for parameter in written]


def _parameters(plugin: Any, node: Node) -> list[Parameter]:
    """Return the tensors, then the attributes, with the annotations that TensorRT requires."""
    kinds = {
        **dict.fromkeys(_names(node)[0], plugin.TensorDesc),
        **{name: ATTRIBUTE_TYPES[kind] for name, kind in node.attributes.items()},
    }
    return [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in kinds.items()]
