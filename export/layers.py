"""Read what a TensorRT builder says about the layers of an engine that it has made, without running it.

With detailed profiling and a verbose logger the builder logs a line for every kernel: its type, the types and shapes of
what it reads and writes, and the ONNX nodes that it came from. No document describes the form of these lines, so a line
that cannot be read is counted and never guessed at.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

BYTES: Mapping[str, float] = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1, "FP8": 1, "Bool": 1, "Int4": 0.5, "FP4": 0.5,
    "Int32": 4, "Int64": 8,
}  # fmt: skip
PRODUCTS = ("gemm", "correlation", "convolution", "deconvolution")  # types of layers that multiply matrices
PRODUCT_WORDS = ("Fc", "Conv", "gemm", "mha")  # parts of the names of kernels that were generated and do
SYNCHRONISATION = ("signal", "wait", "shape_call")
CUSTOM = "custom_layer"  # a plugin
MOVES = frozenset({"Move", "Tran", "Resh", "Repl", "Slic", "Cast", "Copy", "Reformat", "Conc"})  # words of kernels

_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_WORD = re.compile(r"[A-Z][a-z0-9]*|[a-z0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """What a layer reads or writes; -1 is a free size."""

    dtype: str  # the builder's word: Float, Half, Int8 …
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers there are for one image."""
        return prod(max(size, 1) for size in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One kernel of an engine."""

    name: str
    kind: str  # the builder's word: gemm, correlation, kgen, custom_layer …
    kernel: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]  # of the ONNX graph, that it computes or a share of
    bytes: int  # read and written for one image, if nothing stays in a cache
    macs: int = 0  # multiply-accumulates of one image, of the nodes that it multiplies for

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return self.kind in PRODUCTS or any(word in words(self.name) for word in PRODUCT_WORDS)

    @property
    def only_moves(self) -> bool:
        """Whether its name says that it does nothing but copy, cut, cast or scale the numbers of a picture or token."""
        found, counts = words(self.name), all(tensor.dtype in ("Int32", "Int64") for tensor in self.outputs)
        return self.kind not in PRODUCTS and not counts and bool(found) and found <= MOVES | {"Mul"}

    @property
    def decodes_weights(self) -> bool:
        """Whether it writes stored integers as floats into memory, where they are read again."""
        from_codes = any(tensor.dtype in ("Int8", "Int4") for tensor in self.constants)
        to_floats = all(tensor.dtype in ("Float", "Half", "BFloat16") for tensor in self.outputs)
        return not self.inputs and from_codes and to_floats and not self.is_product

    @property
    def dtype(self) -> str:
        """The type that it computes in: that of what it reads first, or else writes."""
        return next((tensor.dtype for tensor in (*self.inputs, *self.outputs, *self.constants)), "–")


def parse_layers(text: str, macs: Mapping[str, int]) -> tuple[tuple[Layer, ...], int]:
    """Return the layers of the builder's list, without those that only synchronise, and how many lines were not read.

    Args:
        text: begins with "Layers:"; what follows the list is not looked at.
        macs: of the ONNX nodes that multiply matrices, by name. Layers that share a node share its MACs evenly.
    """
    lines = text.partition("Layers:")[2].split("\n\n")[0].strip().splitlines()
    read = [_layer(line) for line in lines]
    layers = [layer for layer in read if layer is not None and layer.kind not in SYNCHRONISATION]
    return tuple(_with_macs(layers, macs)), sum(layer is None for layer in read)


def words(name: str) -> frozenset[str]:
    """Return the words of a generated kernel's name, such as Fc and Add of ``__myl_FcAdd_myl0_69``."""
    match = re.match(r"_+(?:myl_)?([A-Za-z_]+?)(?:_v\d+)?_myl\d+_\d+$", name)
    return frozenset(_WORD.findall(match[1])) if match else frozenset()


def _layer(line: str) -> Layer | None:
    fields = _fields(line)
    if not {"Name", "LayerType", "Inputs", "Outputs"} <= fields.keys():
        return None
    inputs, constants, outputs = (_tensors(fields.get(key, "")) for key in ("Inputs", "Constants", "Outputs"))
    nodes = dict.fromkeys(_node_name(text) for text in _NODE.findall(fields.get("Metadata", "")))
    size = sum(tensor.elements * BYTES.get(tensor.dtype, 0) for tensor in (*inputs, *constants, *outputs))
    return Layer(
        name=fields["Name"], kind=fields["LayerType"], kernel=fields.get("TacticName", ""), inputs=inputs,
        constants=constants, outputs=outputs, nodes=tuple(nodes), bytes=int(size),
    )  # fmt: skip


def _fields(line: str) -> dict[str, str]:
    """Split ``Key: value, Key: value`` at the commas that stand in no bracket."""
    fields: dict[str, str] = {}
    depth = start = 0
    for place, sign in enumerate(line + ","):
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            key, _, value = line[start:place].strip().partition(": ")
            fields.setdefault(key.rstrip(":"), value)
            start = place + 1
    return fields


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(dtype=match["dtype"], shape=tuple(int(size) for size in match["shape"].split(",") if size))
        for match in _TENSOR.finditer(text)
    )


def _node_name(text: str) -> str:
    """Return the name of a node; that of one in a function reads ``inner | node (Operator)``."""
    outer = text.rpartition(" | ")[2]
    return re.sub(r" \(\w+\)$", "", outer)


def _with_macs(layers: Sequence[Layer], macs: Mapping[str, int]) -> Iterable[Layer]:
    sharers: dict[str, int] = {}
    for layer in layers:
        for node in layer.nodes if layer.is_product else ():
            sharers[node] = sharers.get(node, 0) + 1
    for layer in layers:
        own = sum(macs.get(node, 0) // sharers[node] for node in layer.nodes) if layer.is_product else 0
        yield replace(layer, macs=own)
