"""The nodes of domain ``medseg`` that a kernel computes: the launch that follows from tensors and attributes.

A TensorRT plugin has the name of a node; its inputs and outputs are the kernel's arrays, in the kernel's order. This
module does not depend on TensorRT: a dimension is an integer, or an expression that supports ``*`` and ``//``.
Source: ``export/graph/functions.py``, which defines every node by standard operators.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import mul
from typing import Any, Literal

from medseg_trt.kernels import load
from medseg_trt.kernels.compile import sources
from medseg_trt.kernels.kernel import C_TYPES, Entry, Kernel, Parameter, float_bits

NAMESPACE, VERSION = "medseg", "1"  # of the plugins, as attributes of every node name them

Attributes = Mapping[str, int | float]
Dims = Sequence[Any]  # of one tensor
EPSILON: Mapping[str, Literal["float32", "int32"]] = {"epsilon": "float32"}
SCALE: Mapping[str, Literal["float32", "int32"]] = {"scale": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """The launch and the output shapes that follow from the input shapes; ``plugin.cpp`` has the same in C++."""

    scalars: Callable[[Sequence[Dims], Attributes], dict[str, Any]]  # int32 arguments that depend on shapes
    outputs: Callable[[Sequence[Dims], Attributes], list[Any]]  # of every output; the last one repeats


def _heads(dims: Sequence[Dims], attributes: Attributes) -> dict[str, Any]:
    batch, tokens, columns = dims[0]
    heads = int(attributes["num_heads"] + 2 * attributes["num_kv_heads"])
    head_dim = columns // heads
    return {"batch": batch, "tokens": tokens, "first_position": 0, "head_dim": head_dim, "copy_values": 1}


def _by_head(dims: Sequence[Dims], attributes: Attributes) -> list[Any]:
    heads = _heads(dims, attributes)
    numbers = int(attributes["num_heads"]), int(attributes["num_kv_heads"])
    return [[heads["batch"], number, heads["tokens"], heads["head_dim"]] for number in numbers]


def _rows(dims: Dims) -> Any:
    """Return the number of rows of a tensor: the product of all axes but the last."""
    return reduce(mul, dims[1:-1], dims[0])


RULES: Mapping[str, Rule] = {
    "rows": Rule(
        scalars=lambda dims, attributes: {"rows": _rows(dims[0]), "width": dims[0][-1]},
        outputs=lambda dims, attributes: [list(dims[0])],
    ),
    "half_rows": Rule(
        scalars=lambda dims, attributes: {"rows": _rows(dims[0]), "width": dims[0][-1] // 2},
        outputs=lambda dims, attributes: [[*dims[0][:-1], dims[0][-1] // 2]],
    ),
    "heads": Rule(scalars=_heads, outputs=_by_head),
}
RANK: Mapping[str, tuple[int, int]] = {"rows": (2, 8), "half_rows": (2, 8), "heads": (3, 3)}  # least and most axes


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node and its kernel.

    ``functions`` is the format of the entries' names: {dtype} is the type of the first input, and the name of an
    attribute of ``choices`` is replaced by the word at its value.
    """

    name: str
    kernel_name: str  # a key of KERNELS
    rule: str  # a key of RULES
    functions: str
    attributes: Mapping[str, Literal["float32", "int32"]] = field(default_factory=dict[str, Any])  # all must be given
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, Any])

    @property
    def kernel(self) -> Kernel:
        """Return the kernel."""
        return load(self.kernel_name)

    def entries(self, attributes: Attributes) -> dict[str, Entry]:
        """Return the function for each type of the first input.

        Raises:
            ValueError: no function exists for the value of an attribute.
        """
        words = dict[str, str]()
        for name, choices in self.choices.items():
            if attributes[name] not in range(len(choices)):
                raise ValueError(f"{NAMESPACE}.{self.name}: {name} is {attributes[name]}; it must be 0 or 1")
            words[name] = choices[int(attributes[name])]
        return {dtype: self.kernel.entry(self.functions.format(dtype=dtype, **words)) for dtype in C_TYPES}

    def entry(self, dtype: str, attributes: Attributes) -> Entry:
        """Return the function for a type of the first input.

        Raises:
            ValueError: no function takes this type.
        """
        entries = self.entries(attributes)
        if dtype not in entries:
            raise ValueError(f"{NAMESPACE}.{self.name} takes {', '.join(entries)}, not {dtype}")
        return entries[dtype]

    def output_dims(self, dims: Sequence[Dims], attributes: Attributes, number: int) -> list[list[Any]]:
        """Return the dimensions of ``number`` outputs from those of the inputs."""
        shapes = RULES[self.rule].outputs(dims, attributes)
        return [shapes[min(index, len(shapes) - 1)] for index in range(number)]

    def arguments(self, dims: Sequence[Dims], attributes: Attributes) -> dict[str, Any]:
        """Return every int32 argument of a launch, by name: from shapes, and from attributes (a float as its bits)."""
        bits = {
            f"{name}_bits": float_bits(attributes[name]) for name, kind in self.attributes.items() if kind != "int32"
        }
        numbers = {name: int(attributes[name]) for name, kind in self.attributes.items() if kind == "int32"}
        return {**RULES[self.rule].scalars(dims, attributes), **bits, **numbers}

    def launch_scalars(self, entry: Entry, shapes: Sequence[Sequence[int]], attributes: Attributes) -> dict[str, int]:
        """Return the int32 arguments of a function for inputs of these shapes.

        Raises:
            ValueError: the shapes do not match each other.
        """
        least, most = RANK[self.rule]
        read = split(entry)[0]
        if not least <= len(shapes[0]) <= most:
            raise ValueError(
                f"{NAMESPACE}.{self.name}: {read[0].name} has {len(shapes[0])} axes, not {least} to {most}"
            )
        values = self.arguments(shapes, attributes)
        scalars = {
            parameter.name: values[parameter.name] for parameter in entry.parameters if parameter.kind == "int32"
        }
        expected_shapes = self.kernel.shapes(scalars, entry)
        if scalars.get("head_dim", 0) % 2:
            raise ValueError(f"{NAMESPACE}.{self.name}: a head has {scalars['head_dim']} columns; it must be even")
        for name, shape in zip((parameter.name for parameter in read), shapes, strict=True):
            if math.prod(shape) != math.prod(expected_shapes[name]) or shape[-1] != expected_shapes[name][-1]:
                raise ValueError(
                    f"{NAMESPACE}.{self.name}: {name} has shape {tuple(shape)}; it must be {expected_shapes[name]}"
                )
        return scalars

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that defines the plugin: the kernel's sources, functions and attributes."""
        entries = [asdict(entry) for entry in self.kernel.entries]
        definition = [NAMESPACE, VERSION, asdict(self), sources(self.kernel.source), entries]
        return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def split(entry: Entry) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...]]:
    """Return the arrays that a function reads and those that it writes."""
    arrays = [parameter for parameter in entry.parameters if parameter.kind == "pointer"]
    read, written = (
        [parameter for parameter in arrays if parameter.direction == direction] for direction in ("in", "out")
    )
    return tuple(read), tuple(written)


NODES: Mapping[str, Node] = {
    node.name: node
    for node in (
        Node(name="RMSNorm", kernel_name="rmsnorm", rule="rows", functions="rmsnorm_{dtype}", attributes=EPSILON),
        Node(
            name="AddRMSNorm",
            kernel_name="add_rmsnorm",
            rule="rows",
            functions="add_rmsnorm_{dtype}",
            attributes=EPSILON,
        ),
        Node(
            name="Rotary",
            kernel_name="rotary",
            rule="heads",
            functions="rotary_{dtype}_{interleaved}_table",
            attributes={"num_heads": "int32", "num_kv_heads": "int32", "interleaved": "int32"},
            choices={"interleaved": ("half", "interleaved")},
        ),
        Node(name="SwiGLU", kernel_name="swiglu", rule="half_rows", functions="swiglu_{dtype}"),
        # The same with y quantised as by QuantizeLinear, int8 with one scale: the input of an INT8 GEMM.
        Node(
            name="QuantizedRMSNorm",
            kernel_name="rmsnorm",
            rule="rows",
            functions="rmsnorm_{dtype}_int8",
            attributes={**EPSILON, **SCALE},
        ),
        Node(
            name="QuantizedAddRMSNorm",
            kernel_name="add_rmsnorm",
            rule="rows",
            functions="add_rmsnorm_{dtype}_int8",
            attributes={**EPSILON, **SCALE},
        ),
        Node(
            name="QuantizedSwiGLU",
            kernel_name="swiglu",
            rule="half_rows",
            functions="swiglu_{dtype}_int8",
            attributes=SCALE,
        ),
        Node(
            name="QuantizedLayerNorm",
            kernel_name="layernorm_quant",
            rule="rows",
            functions="layernorm_quant_{dtype}_int8",
            attributes={**EPSILON, **SCALE},
        ),
    )
}
