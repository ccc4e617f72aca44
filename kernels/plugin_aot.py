"""The kernels as ahead-of-time plugins of classic TensorRT (10.9 and newer): the PTX is in the plan, and runs alone.

An engine with these plugins needs neither Python nor a library of ours. TensorRT asks once, while it builds, which PTX
to launch, with how many blocks, and with which integers between the inputs' addresses and the outputs': the order in
which every kernel here takes its arguments. TensorRT-RTX has no such plugins.
Source: TensorRT, "Quickly deployable plugins", ``tensorrt.plugin``. Nothing here has run: it needs a GPU's TensorRT.
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
    """Make every node of ``NODES`` known to TensorRT, and return each plugin's digest.

    In one process it is either this or ``plugin.register``: the plugins have the same names.

    Args:
        trt: the module ``tensorrt``, whose sub-module ``plugin`` is imported.
        capability: of the device that the engine is for, 86 for sm_86.
        cuda: the newest CUDA release that the device's driver knows.
        find_ptx: where the PTX comes from.

    Raises:
        MedsegError: this TensorRT has no ahead-of-time plugins, or plugins of these names are registered already.
    """
    plugin: Any = getattr(trt, "plugin", None)
    if not hasattr(plugin, "aot_impl"):
        raise MedsegError(f"{trt.__name__} has no ahead-of-time plugins; TensorRT 10.9 has. Use plugin.register")
    creators = trt.get_plugin_registry().all_creators
    if there := sorted({each.name for each in creators if each.plugin_namespace == NAMESPACE} & NODES.keys()):
        raise MedsegError(f"{NAMESPACE} plugins are registered already: {', '.join(there)}; use a process of its own")

    def ptx_for(node: Node, entry_name: str) -> str:
        return find_ptx(node.kernel, node.kernel.entry(entry_name), capability, cuda)

    for node in NODES.values():
        name = f"{NAMESPACE}::{node.name}"
        plugin.register(name)(_describe(trt, plugin, node))
        plugin.aot_impl(name)(_implement(plugin, node, ptx_for))
    return {name: node.digest for name, node in NODES.items()}


def _describe(trt: ModuleType, plugin: Any, node: Node) -> Callable[..., Any]:
    """Return what TensorRT asks for the outputs; it reads the arguments' names and types off the signature."""
    number = len(_names(node)[1])

    def describe(*tensors: Any, **attributes: Any) -> Any:
        entry = node.entry(dtype_name(tensors[0].dtype), attributes)
        read, written = split(entry)
        for parameter, tensor in zip(read, tensors, strict=True):
            if tensor.dtype != data_type(trt, parameter.dtype):
                raise ValueError(f"{NAMESPACE}.{node.name}: {parameter.name} must be {parameter.dtype}")
        shapes = node.output_dims([list(each.shape_expr) for each in tensors], attributes, number)
        outputs = tuple(
            plugin.TensorDesc(plugin.ShapeExprs.from_tuple(tuple(shape)), dtype=data_type(trt, parameter.dtype))
            for shape, parameter in zip(shapes, written, strict=True)
        )
        return outputs if number > 1 else outputs[0]

    made = tuple[(plugin.TensorDesc,) * number] if number > 1 else plugin.TensorDesc
    describe.__signature__ = Signature(_parameters(plugin, node), return_annotation=made)
    return describe


def _implement(plugin: Any, node: Node, ptx_for: Callable[[Node, str], str]) -> Callable[..., Any]:
    """Return what TensorRT asks for the kernel: its name, PTX, blocks and threads, and the integers it takes."""
    read, written = _names(node)

    def implement(*given: Any) -> tuple[str, str, Any, Any]:
        tensors, values = given[: len(read)], given[len(read) : -2]  # then come the outputs and the tactic
        attributes = dict(zip(node.attributes, values, strict=True))
        entry = node.entry(dtype_name(tensors[0].dtype), attributes)
        scalars = node.arguments([list(each.shape_expr) for each in tensors], attributes)
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = node.kernel.grid(scalars)
        launch.block_x, launch.block_y, launch.block_z = node.kernel.block
        launch.shared_mem = node.kernel.shared_bytes
        integers = [scalars[each.name] for each in entry.parameters if each.kind == "int32"]
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
    return [each.name for each in read], [each.name for each in written]


def _parameters(plugin: Any, node: Node) -> list[Parameter]:
    """Return the tensors, then the attributes, as TensorRT wants them annotated."""
    kinds = {
        **dict.fromkeys(_names(node)[0], plugin.TensorDesc),
        **{name: ATTRIBUTE_TYPES[kind] for name, kind in node.attributes.items()},
    }
    return [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in kinds.items()]
