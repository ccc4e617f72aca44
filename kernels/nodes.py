"""The nodes of domain ``medseg`` that a kernel computes: how tensors and attributes become a launch.

A TensorRT plugin has a node's name; its inputs and outputs are the kernel's arrays, in the kernel's order. Nothing here
knows TensorRT: dimensions are integers, or whatever expressions a library has for them.
Source: ``export/functions.py``, which says what each node means in standard operators.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medseg_trt.kernels import load
from medseg_trt.kernels.compile import sources
from medseg_trt.kernels.kernel import C_TYPES, Entry, Kernel, Parameter, float_bits

NAMESPACE, VERSION = "medseg", "1"  # of the plugins, as attributes of every node name them

Attributes = Mapping[str, float]
Shape = Sequence[int]
Dims = Sequence[Any]  # of one tensor: integers, or expressions


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """What a rule for shapes needs to do with dimensions."""

    constant: Callable[[int], Any]
    divide: Callable[[Any, int], Any]


INTEGERS = Arithmetic(constant=int, divide=lambda dim, number: dim // number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node and the kernel for it."""

    name: str
    kernel_name: str  # a key of KERNELS
    attributes: Mapping[str, Literal["float32", "int32"]]  # each must be given
    entry_name: Callable[[str, Attributes], str]  # from the type of the first input
    scalars: Callable[[Sequence[Shape], Attributes], dict[str, int]]  # of the launch, from the inputs' shapes
    output_dims: Callable[[Sequence[Dims], Attributes, Arithmetic], list[list[Any]]]  # from the inputs'

    @property
    def kernel(self) -> Kernel:
        """Return the kernel."""
        return load(self.kernel_name)

    def entries(self, attributes: Attributes) -> dict[str, Entry]:
        """Return the function for each type of the first input."""
        return {dtype: self.kernel.entry(self.entry_name(dtype, attributes)) for dtype in C_TYPES}

    def entry(self, dtype: str, attributes: Attributes) -> Entry:
        """Return the function for a type of the first input.

        Raises:
            ValueError: there is none for that type.
        """
        entries = self.entries(attributes)
        if dtype not in entries:
            raise ValueError(f"{NAMESPACE}.{self.name} takes {', '.join(entries)}, not {dtype}")
        return entries[dtype]

    def launch_scalars(self, entry: Entry, shapes: Sequence[Shape], attributes: Attributes) -> dict[str, int]:
        """Return every int32 argument of a function for inputs of these shapes.

        Raises:
            ValueError: the shapes do not belong together.
        """
        named = [parameter.name for parameter in split(entry)[0]]
        scalars = {**self.scalars(shapes, attributes), **_bits(attributes)}
        wanted = self.kernel.shapes(scalars, entry)
        for name, shape in zip(named, shapes, strict=True):
            if not shape or math.prod(shape) != math.prod(wanted[name]) or shape[-1] != wanted[name][-1]:
                raise ValueError(f"{NAMESPACE}.{self.name}: {name} has shape {tuple(shape)}; it must be {wanted[name]}")
        return scalars

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what the plugin computes: the kernel's sources, its functions and the attributes."""
        kernel = self.kernel
        entries = [asdict(entry) for entry in kernel.entries]
        made_of = [NAMESPACE, self.name, VERSION, dict(self.attributes), sources(kernel.source), entries]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def split(entry: Entry) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...]]:
    """Return the arrays that a function reads and those that it writes."""
    arrays = [parameter for parameter in entry.parameters if parameter.kind == "pointer"]
    read, written = ([each for each in arrays if each.direction == direction] for direction in ("in", "out"))
    return tuple(read), tuple(written)


def _bits(attributes: Attributes) -> dict[str, int]:
    return {f"{name}_bits": float_bits(value) for name, value in attributes.items() if isinstance(value, float)}


def _rows(shapes: Sequence[Shape], attributes: Attributes) -> dict[str, int]:
    return {"rows": math.prod(shapes[0][:-1]), "width": shapes[0][-1]}


def _half_rows(shapes: Sequence[Shape], attributes: Attributes) -> dict[str, int]:
    return {"rows": math.prod(shapes[0][:-1]), "width": shapes[0][-1] // 2}


def _heads(shapes: Sequence[Shape], attributes: Attributes) -> dict[str, int]:
    if len(shapes[0]) != 3:
        raise ValueError(f"{NAMESPACE}.Rotary: qkv has shape {tuple(shapes[0])}; it must be (batch, tokens, columns)")
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["num_kv_heads"])
    batch, tokens, columns = shapes[0]
    return {
        "batch": batch, "tokens": tokens, "first_position": 0, "num_heads": heads, "num_kv_heads": kv_heads,
        "head_dim": columns // (heads + 2 * kv_heads), "copy_values": 1,
    }  # fmt: skip


def _as_first(number: int) -> Callable[[Sequence[Dims], Attributes, Arithmetic], list[list[Any]]]:
    """Return the rule that each of ``number`` outputs has the shape of the first input."""
    return lambda dims, attributes, arithmetic: [list(dims[0]) for _ in range(number)]


def _half_of_first(dims: Sequence[Dims], attributes: Attributes, arithmetic: Arithmetic) -> list[list[Any]]:
    return [[*dims[0][:-1], arithmetic.divide(dims[0][-1], 2)]]


def _by_head(dims: Sequence[Dims], attributes: Attributes, arithmetic: Arithmetic) -> list[list[Any]]:
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["num_kv_heads"])
    batch, tokens, columns = dims[0]
    head_dim = arithmetic.divide(columns, heads + 2 * kv_heads)
    return [[batch, arithmetic.constant(number), tokens, head_dim] for number in (heads, kv_heads, kv_heads)]


NODES: Mapping[str, Node] = {
    node.name: node
    for node in (
        Node(
            name="RMSNorm",
            kernel_name="rmsnorm",
            attributes={"epsilon": "float32"},
            entry_name=lambda dtype, attributes: f"rmsnorm_{dtype}",
            scalars=_rows,
            output_dims=_as_first(1),
        ),
        Node(
            name="AddRMSNorm",
            kernel_name="add_rmsnorm",
            attributes={"epsilon": "float32"},
            entry_name=lambda dtype, attributes: f"add_rmsnorm_{dtype}",
            scalars=_rows,
            output_dims=_as_first(2),
        ),
        Node(
            name="Rotary",
            kernel_name="rotary",
            attributes={"num_heads": "int32", "num_kv_heads": "int32", "interleaved": "int32"},
            entry_name=lambda dtype, attributes: (
                f"rotary_{dtype}_{'interleaved' if attributes['interleaved'] else 'half'}_table"
            ),
            scalars=_heads,
            output_dims=_by_head,
        ),
        Node(
            name="SwiGLU",
            kernel_name="swiglu",
            attributes={},
            entry_name=lambda dtype, attributes: f"swiglu_{dtype}",
            scalars=_half_rows,
            output_dims=_half_of_first,
        ),
    )
}
