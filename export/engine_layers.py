"""The layers of an engine as the builder lists them, and the expectations that they meet or fail.

Type names are the builder's. The names of generated kernels consist of abbreviated operations, such as Fc and Add in
``__myl_FcAdd_myl0_69``.
"""

import re
from dataclasses import dataclass
from math import prod

SCHEMA = 1
LAYERS_SUFFIX = ".layers.json"  # of the report beside a plan
PRODUCTS = ("gemm", "correlation", "convolution", "deconvolution")  # types of layers that multiply matrices
PRODUCT_WORDS = ("Fc", "Conv", "gemm", "mha")  # operations that multiply matrices, in the names of generated kernels
CUSTOM = "custom_layer"  # a plugin
QUANTISED_DTYPES = ("Int8", "Int4", "FP8")  # types of quantised values
COUNTERS = ("Int32", "Int64")  # shape values, which occur with a free batch size
MOVES = frozenset(
    {"Move", "Tran", "Resh", "Repl", "Slic", "Cast", "Copy", "Reformat", "Conc"}
)  # operations in the names of kernels

_WORD = re.compile(r"[A-Z][a-z0-9]*|[a-z0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """An input, constant or output of a layer; -1 is a free size."""

    dtype: str  # the builder's name: Float, Half, Int8 …
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements for one image."""
        return prod(max(size, 1) for size in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One kernel of an engine."""

    name: str
    kind: str  # the builder's name: gemm, correlation, kgen, custom_layer …
    kernel: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    nodes: tuple[str, ...]  # of the ONNX graph, which it computes completely or in part
    bytes: int  # read and written for one image, without caches
    macs: int = 0  # multiply-accumulates for one image
    part: str = ""  # of the network: resnet, vit, block or decoder; a layer without nodes has that of the layer before

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return self.kind in PRODUCTS or any(word in words(self.name) for word in PRODUCT_WORDS)

    @property
    def only_moves(self) -> bool:
        """Whether, by its name, it only copies, slices, casts or scales activations."""
        operations, is_shape_only = words(self.name), all(tensor.dtype in COUNTERS for tensor in self.outputs)
        if self.kind in PRODUCTS or is_shape_only:
            return False
        return bool(operations) and operations <= MOVES | {"Mul"}

    @property
    def decodes_weights(self) -> bool:
        """Whether it dequantises a stored weight to memory, from which another layer reads it."""
        from_quantised = any(tensor.dtype in QUANTISED_DTYPES for tensor in self.constants)
        to_floats = all(tensor.dtype in ("Float", "Half", "BFloat16") for tensor in self.outputs)
        return not self.inputs and from_quantised and to_floats and not self.is_product

    @property
    def dtype(self) -> str:
        """The type that it computes in.

        A product computes in the type of its weight, or of its input where it dequantises the weight; other layers in
        the type of their inputs.
        """
        read = [tensor.dtype for tensor in self.inputs] or [tensor.dtype for tensor in self.outputs]
        weight = max(self.constants, key=lambda tensor: tensor.elements, default=None)
        if not self.is_product or weight is None or weight.elements == 1:
            skipped = (*COUNTERS, *QUANTISED_DTYPES) if self.is_product else COUNTERS
            return next((dtype for dtype in read if dtype not in skipped), read[0] if read else "–")
        if weight.dtype not in QUANTISED_DTYPES:
            return weight.dtype
        return next((dtype for dtype in read if dtype not in QUANTISED_DTYPES), weight.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one expectation."""

    name: str
    asked: int  # number of nodes or layers that it applies to
    failed: tuple[str, ...]  # "node in part: why"

    @property
    def holds(self) -> bool:
        """Whether no node or layer failed it."""
        return not self.failed

    def failed_in(self, part: str) -> tuple[str, ...]:
        """Return the failures in a part of the network."""
        return tuple(failure for failure in self.failed if failure.partition(":")[0].endswith(f" in {part}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """The layers of an engine, and the results of the expectations."""

    schema: int = SCHEMA
    layers: tuple[EngineLayer, ...]
    outcomes: tuple[Outcome, ...]
    unread: int  # lines of the builder's list that could not be parsed

    __pydantic_config__ = {"extra": "forbid"}


def words(name: str) -> frozenset[str]:
    """Return the operations in a generated kernel's name, such as Fc and Add in ``__myl_FcAdd_myl0_69``."""
    match = re.match(r"_+(?:myl_)?([A-Za-z_]+?)(?:_v\d+)?_myl\d+_\d+$", name)
    return frozenset(_WORD.findall(match[1])) if match else frozenset()
